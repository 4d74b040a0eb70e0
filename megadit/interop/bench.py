"""Training speed of a model beside diffusers' class of the same architecture and sizes, on this machine, in one run.

`python -m megadit.interop.bench [RECIPE] [--batch N] [--precision bf16|fp32]`. A step is forward,
backward and AdamW on random data. Steps of the two models alternate, so that both see the same machine; the ratio is
the median over the pairs.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megadit import models, timing
from megadit.interop.diffusers import peer
from megadit.interop.layouts import format_of
from megadit.recipe import Recipe, load
from megadit.training.synthetic import synthetic_batch

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


def compare(recipe: Recipe, batch_size: int, num_text_tokens: int, precision: str, num_pairs: int) -> str:
    """The table that the command prints."""
    config = recipe.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours, theirs = models.build(config).to(device), peer(config).to(device)
    our_inputs, their_inputs = _inputs(recipe, batch_size, num_text_tokens, device)

    def context() -> AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    pairs = timing.time_pairs(
        training_step(ours, lambda: ours(**our_inputs), context()),
        training_step(theirs, lambda: theirs(**their_inputs, return_dict=False)[0], context()),
        num_pairs,
    )
    lines = [
        f"{config.depth} blocks of width {config.width}, {num_text_tokens} text tokens, batch {batch_size}, "
        f"{precision}, median of {num_pairs} training steps, {timing.machine()}",
        f"{'model':<36}{'parameters':>14}{'ms/step':>10}",
    ]
    for which, (library, model) in enumerate((("megadit", ours), ("diffusers", theirs))):
        name, num_parameters = f"{library} {type(model).__name__}", sum(p.numel() for p in model.parameters())
        lines.append(f"{name:<36}{num_parameters:>14,}{pairs.median_ms(which):>10.1f}")
    lines.append(f"megadit takes {pairs.ratio():.2f} steps in the time of one of diffusers")
    return "\n".join(lines)


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


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m megadit.interop.bench", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="quickstart", help="name or path of a recipe")
    parser.add_argument("--batch", type=int, help="samples of a step (default: the recipe's batch on one rank)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: the recipe's")
    parser.add_argument("--text-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps to time")
    args = parser.parse_args()

    def table() -> str:
        recipe = load(args.recipe)
        batch = args.batch or recipe.training.batch_size // recipe.engine.num_ranks
        return compare(recipe, batch, args.text_tokens, args.precision or recipe.training.precision, args.pairs)

    return timing.print_table(table)


if __name__ == "__main__":
    sys.exit(main())
