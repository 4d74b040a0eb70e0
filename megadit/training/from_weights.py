"""A run that begins with weights from elsewhere (`megadit train --from-weights`), and with fresh moments and averages.

What they are is said in RUN/started_from.json, and they are the run's first checkpoint, of 0 images: a resume needs
nothing but the run. Where the readout's multiplier is another here, its weights are scaled, so that the function stays.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from megadit.engines.base import Engine
from megadit.files import write_text
from megadit.models import ModelConfig
from megadit.parametrization.base_shapes import meta_model
from megadit.parametrization.spec import ParamSpec
from megadit.recipe import Recipe
from megadit.training import checkpoint

FILE = "started_from.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What was found: in a checkpoint of a run, of which each rank reads its own part, or as tensors."""

    kind: str  # "weight" or an average's name
    sha256: str  # of the file, or of what has the checksums of the files
    shapes: Mapping[str, Sequence[int]]  # by our names
    multipliers: Mapping[str, float] = field(default_factory=dict)  # of readouts, by their weights; others have 1
    path: Path | None = None  # the checkpoint
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # may have buffers, too


@dataclass(frozen=True)
class WeightSource:
    """Where weights are to come from, as a user says it."""

    place: str
    kind: str | None  # None: the first average
    read: Callable[[Recipe], Weights]  # for a model of this recipe; raises ValueError


def check(run: Path, source: WeightSource | None) -> bool:
    """Whether `run` is still to be begun from `source`. Raises ValueError where it has begun otherwise, or was to."""
    stored = json.loads((run / FILE).read_text()) if (run / FILE).exists() else None
    begun = bool(checkpoint.newest_first(run / "checkpoints"))
    if source is None:
        if stored is not None and not begun:
            raise ValueError(
                f"{run} was to start from {stored['place']} and has no checkpoint yet: give --from-weights again"
            )
        return False
    if begun and stored is None:
        raise ValueError(
            f"{run} has begun, and not from other weights: leave --from-weights out, or give another --run"
        )
    if stored is not None and (stored["place"], stored["asked"]) != (source.place, source.kind):
        raise ValueError(
            f"{run} was started from {stored['place']} ({stored['asked'] or 'the first average'}), not from "
            f"{source.place} ({source.kind or 'the first average'}): give another --run"
        )
    return not begun


def drawn_anew(weights: Weights, specs: Sequence[ParamSpec], config: ModelConfig, place: str) -> list[str]:
    """Embeddings that have another number of rows there, and keep their initial values.

    Raises ValueError, naming the first parameter that differs, for weights of another model.
    """
    model, found = meta_model(config), list[str]()
    for spec in specs:
        there, here = weights.shapes.get(spec.name), list(spec.shape)
        if there is None:
            raise ValueError(f"{place} has weights of another model: {spec.name} is not there")
        if list(there) == here:
            continue
        if isinstance(model.get_submodule(spec.name.rpartition(".")[0]), nn.Embedding) and list(there)[1:] == here[1:]:
            found.append(spec.name)
            continue
        raise ValueError(f"{place} has weights of another model: {spec.name} is {list(there)} there, {here} here")
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if unknown := next((name for name in weights.shapes if name not in known), None):
        raise ValueError(f"{place} has weights of another model: {unknown} is not in this one")
    return found


def note(run: Path, source: WeightSource, weights: Weights, anew: Sequence[str]) -> None:
    """Write down what the run begins with."""
    facts = {
        "place": source.place,
        "asked": source.kind,
        "weights": weights.kind,
        "sha256": weights.sha256,
        "drawn_anew": list(anew),
    }
    write_text(run / FILE, json.dumps(facts, indent=1))
    logger.info("started from %s, its %s", source.place, weights.kind)
    for name in anew:
        logger.info("%s has another number of rows there: it is drawn anew", name)


@torch.no_grad()
def put(weights: Weights, engine: Engine, specs: Sequence[ParamSpec], anew: Sequence[str]) -> None:
    """Give an engine's model the weights; all ranks together. What is drawn anew keeps its initial values."""
    shards = {name: shard for name, shard in engine.shards.items() if name not in anew}
    if weights.path is not None:
        checkpoint.load_weights(weights.path, weights.kind, shards, engine.topology)
    else:
        for name, shard in shards.items():
            end = shard.offset + shard.values.numel()
            shard.values.copy_(weights.tensors[name].reshape(-1)[shard.offset : end])
    for spec in specs:
        there = weights.multipliers.get(spec.name, 1.0)
        if spec.name in shards and not math.isclose(there, spec.multiplier):
            shards[spec.name].values.mul_(there / spec.multiplier)
            if engine.topology.is_first:
                logger.info(
                    "%s is scaled by %g: its multiplier is %g there, %g here",
                    *(spec.name, there / spec.multiplier, there, spec.multiplier),
                )
    _name_other_buffers(weights, engine)
    engine.weights_written()


def _name_other_buffers(weights: Weights, engine: Engine) -> None:
    """Fixed tables are the model's own; where those of a file are others, somebody should know."""
    for name, ours in engine.model.named_buffers():
        theirs = weights.tensors.get(name)
        if theirs is None or theirs.shape != ours.shape or not engine.topology.is_first:
            continue
        if not torch.allclose(theirs.float(), ours.float().cpu(), atol=1e-2):
            logger.warning("the fixed table %s is another one there; the model keeps its own", name)
