"""`megadit bench peers`: training speed of a model beside diffusers' class of the same architecture and sizes.

A step is forward, backward and AdamW on random data. Steps of the two models alternate, so that both see the same
machine; the ratio is the median over the pairs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megadit import models
from megadit.benchmarks.findings import Table
from megadit.benchmarks.pairs import time_pairs
from megadit.interop.diffusers import peer
from megadit.interop.layouts import format_of
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe

Arguments = dict[str, Any]


def training_step(
    model: nn.Module, predict: Callable[[], Tensor], precision: AbstractContextManager[None]
) -> Callable[[], None]:
    """A function that runs one training step of `model`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with precision:
            loss = predict().float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_peers(recipe: Recipe, batch_size: int, num_text_tokens: int, precision: str, num_pairs: int) -> Table:
    """Raises ValueError for a model that diffusers has no class for."""
    config = recipe.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours, theirs = models.build(config).to(device), peer(config).to(device)
    our_inputs, their_inputs = _inputs(recipe, batch_size, num_text_tokens, device)

    def context() -> AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    pairs = time_pairs(
        training_step(ours, lambda: ours(**our_inputs), context()),
        training_step(theirs, lambda: theirs(**their_inputs, return_dict=False)[0], context()),
        num_pairs,
    )
    return Table(
        title=f"{config.depth} blocks of width {config.width}, {num_text_tokens} text tokens, batch {batch_size}, "
        f"{precision}, median of {num_pairs} training steps",
        baseline="time of a step of diffusers' class",
        rows=[
            {
                "model": f"{library} {type(model).__name__}",
                "parameters": sum(p.numel() for p in model.parameters()),
                "ms/step": pairs.median_ms(which),
                "ratio": 1.0 if which else 1 / pairs.ratio(),
            }
            for which, (library, model) in enumerate((("megadit", ours), ("diffusers", theirs)))
        ],
    )


def _inputs(recipe: Recipe, batch_size: int, num_text_tokens: int, device: torch.device) -> tuple[Arguments, Arguments]:
    """Synthetic arguments of both. Captions are of many lengths, which SD3's class cannot mask."""
    batch = synthetic_batch(recipe, batch_size, num_text_tokens, device)
    batch = replace(batch, text_lengths=torch.arange(batch_size, device=device) % num_text_tokens + 1)
    timestep_B = 1000 * batch.timestep_uniform
    dropped_B = torch.zeros(batch_size, dtype=torch.bool, device=device)
    conditions = {name: getattr(batch, name) for name in recipe.model.conditions.columns}
    ours = {"x_BCHW": batch.images, "timestep_B": timestep_B, "dropped_B": dropped_B, **conditions}
    theirs = {"hidden_states": batch.images, "timestep": timestep_B, **format_of(recipe.model).arguments(batch)}
    return ours, theirs
