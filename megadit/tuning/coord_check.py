"""The coordinate check (Tensor Programs V, arXiv 2203.03466, appendix D.1) as a number and a gate.

Models of several widths train for a few steps on one batch. For every layer and step, log mean |activation| is fitted
by a line in log width. Under muP activations neither grow nor shrink with width: the slope is about 0. Under the
standard parametrization they grow with every update.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megadit import engines, objectives
from megadit.data.format.manifest import Manifest
from megadit.data.loading.loader import Loader
from megadit.distributed import Topology, process_group
from megadit.recipe import Recipe, parse
from megadit.training.data_fits import check_data_fits
from megadit.training.online import OnlineEncoders, encoder_dtype, stream_draws_noise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoordCheck:
    """Mean |activation| of every layer: float64 [widths, seeds, steps, layers]. Step s is after s updates."""

    widths: tuple[int, ...]
    layers: tuple[str, ...]
    sizes: np.ndarray

    def means(self) -> np.ndarray:
        """Over seeds: [widths, steps, layers]."""
        return self.sizes.mean(axis=1)

    def slopes(self) -> np.ndarray:
        """d log mean |activation| / d log width, [steps, layers].

        NaN where the layer is 0 at every width (behind weights that start at 0), infinite where it is at some only.
        """
        means = self.means()
        log_width = np.log(np.array(self.widths, dtype=np.float64))
        log_width -= log_width.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = np.tensordot(log_width, np.log(means), axes=1) / np.square(log_width).sum()
        zero = means == 0
        slopes[zero.any(axis=0)] = np.inf
        slopes[zero.all(axis=0)] = np.nan
        slopes[~np.isfinite(means).all(axis=0)] = np.inf
        return slopes

    def passes(self, band: float) -> bool:
        """Whether no slope is outside [-band, band]."""
        return not bool((np.abs(self.slopes()) > band).any())

    def worst(self) -> tuple[float, int, str]:
        """The slope that is furthest from 0, its step and its layer."""
        slopes = self.slopes()
        step, layer = np.unravel_index(np.nanargmax(np.abs(slopes)), slopes.shape)
        return float(slopes[step, layer]), int(step), self.layers[layer]


def parse_widths(text: str) -> list[int]:
    """`32,64` as [32, 64]. Raises ValueError for anything else."""
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise ValueError(f"widths {text!r} are not whole numbers with commas between, such as 32,64,128") from None


def coord_check(recipe: Recipe, widths: Sequence[int], num_steps: int, num_seeds: int) -> CoordCheck:
    """Train every width with seeds recipe.seed, ... on the recipe's first batch, at its learning rate, no warm-up.

    Called by all ranks. Raises ValueError for fewer than two widths, and for a width that the recipe
    refuses.
    """
    if len(set(widths)) < 2:
        raise ValueError(f"a coordinate check needs at least two widths, not {sorted(set(widths))}")
    recipes = [[_changed(recipe, width, recipe.seed + seed) for seed in range(num_seeds)] for width in widths]
    with process_group(recipe.engine.kind != "single", num_replicas=recipe.engine.num_replicas) as topology:
        check_data_fits(recipe, Manifest.load(recipe.data.url))
        found = []
        for width, row in zip(widths, recipes, strict=True):
            found.append([_train(changed, num_steps, topology) for changed in row])
            if topology.is_first:
                logger.info("width %d: %d seeds, %d steps", width, num_seeds, num_steps)
    layers = tuple(found[0][0][0])
    sizes = [[[list(step.values()) for step in steps] for steps in row] for row in found]
    return CoordCheck(tuple(widths), layers, np.array(sizes))


def _changed(recipe: Recipe, width: int, seed: int) -> Recipe:
    tree = recipe.model_dump(mode="json")
    tree["model"]["width"], tree["seed"] = width, seed
    return parse(tree, f"width {width}")


def _train(recipe: Recipe, num_steps: int, topology: Topology) -> list[dict[str, float]]:
    """Mean |activation| by layer, for each step."""
    engine = engines.build(recipe, topology)
    objective = objectives.build(recipe.objective, recipe.model, engine.device, encoder_dtype(recipe))
    batch_size, with_noise = recipe.training.batch_size, stream_draws_noise(recipe)
    with_features = recipe.objective.needs_features is not None
    loader = Loader(
        recipe.data, recipe.seed, batch_size, topology.data.rank, topology.data.size, with_noise, with_features
    )
    batches = loader.iterate(0)
    batch = next(batches)
    batches.close()
    size = recipe.training.micro_batch_size or len(batch)
    encoders = OnlineEncoders(recipe.encoders, recipe, topology) if recipe.encoders else None
    batch = encoders.encode_training(batch, size) if encoders else batch.to(engine.device)
    timestep_B = objective.timesteps(batch.timestep_uniform)
    parts = list(zip(batch.split(size), timestep_B.split(size), strict=True))
    steps = []
    for _ in range(num_steps):
        with _Recorder(engine.model, topology) as recorder:
            result = engine.train_step(
                [partial(objective.losses, batch=part, timestep_B=part_B) for part, part_B in parts], 1.0
            )
        if result.skipped:
            raise ValueError(f"width {recipe.model.width}: the gradient norm is {result.grad_norm}; lower optimizer.lr")
        steps.append(recorder.means())
    return steps


class _Recorder(AbstractContextManager["_Recorder"]):
    """Collects the mean |output| of every module without children, over micro-batches and ranks."""

    def __init__(self, model: nn.Module, topology: Topology) -> None:
        self._topology = topology
        self._modules = {name: module for name, module in model.named_modules() if not list(module.children())}
        self._sums: dict[str, Tensor] = {}
        self._handles = ExitStack()

    def __enter__(self) -> "_Recorder":
        for name, module in self._modules.items():
            self._handles.callback(module.register_forward_hook(self._hook(name)).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._handles.close()

    def means(self) -> dict[str, float]:
        names = list(self._sums)
        sums = self._topology.sum(torch.stack([self._sums[name] for name in names]))
        return dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                total = tensor.detach().double().abs().sum()
                found = torch.stack([total, torch.tensor(float(tensor.numel()), device=total.device).double()])
                self._sums[name] = self._sums.get(name, 0) + found

        return record
