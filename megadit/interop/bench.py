"""Training speed of a model beside diffusers' class of the same architecture and sizes, on this machine, in one run.

`python -m megadit.interop.bench [RECIPE] [--batch N] [--precision bf16|fp32]`. A step is forward,
backward and AdamW on random data. Steps of the two models alternate, so that both see the same machine; the ratio is
the median over the pairs.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megadit import models, recipe
from megadit.interop.diffusers import peer
from megadit.recipe import ModelConfig


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


def time_pairs(ours: Callable[[], None], theirs: Callable[[], None], num_pairs: int) -> list[tuple[float, float]]:
    """Seconds of (ours, theirs) per pair of steps; which goes first alternates. Two pairs of warm-up are left out."""
    pairs = []
    for index in range(num_pairs + 2):
        seconds = {}
        for step in (ours, theirs) if index % 2 else (theirs, ours):
            start = time.perf_counter()
            step()
            _synchronize()
            seconds[step] = time.perf_counter() - start
        pairs.append((seconds[ours], seconds[theirs]))
    return pairs[2:]


def compare(config: ModelConfig, batch: int, num_text_tokens: int, precision: str, num_pairs: int) -> str:
    """The table that the command prints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours, theirs = models.build(config).to(device), peer(config).to(device)
    our_inputs, their_inputs = _inputs(config, batch, num_text_tokens, device)

    def context() -> AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    pairs = time_pairs(
        training_step(ours, lambda: ours(**our_inputs), context()),
        training_step(theirs, lambda: theirs(**their_inputs, return_dict=False)[0], context()),
        num_pairs,
    )
    rows = [(f"megadit {type(ours).__name__}", ours, 0), (f"diffusers {type(theirs).__name__}", theirs, 1)]
    lines = [
        f"{config.depth} blocks of width {config.width}, {num_text_tokens} text tokens, batch {batch}, {precision}, "
        f"median of {num_pairs} training steps, torch {torch.__version__}, {_machine(device)}",
        f"{'model':<36}{'parameters':>14}{'ms/step':>10}",
    ]
    for name, model, column in rows:
        milliseconds = 1000 * statistics.median(pair[column] for pair in pairs)
        lines.append(f"{name:<36}{sum(p.numel() for p in model.parameters()):>14,}{milliseconds:>10.1f}")
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    lines.append(f"megadit takes {ratio:.2f} steps in the time of one of diffusers")
    return "\n".join(lines)


def _inputs(
    config: ModelConfig, batch: int, num_text_tokens: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random arguments of our model and of diffusers'. Captions are of many lengths, which SD3's class cannot mask."""
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device)
    timestep = 1000 * torch.rand(batch, device=device)
    ours: dict[str, Any] = {"x_BCHW": x, "timestep_B": timestep}
    theirs: dict[str, Any] = {"hidden_states": x, "timestep": timestep}
    if config.family == "dit":
        labels = torch.randint(config.num_classes, (batch,), device=device)
        return ours | {"labels": labels}, theirs | {"class_labels": labels}
    text = torch.randn(batch, num_text_tokens, config.text_dim, device=device)
    lengths = torch.arange(batch, device=device) % num_text_tokens + 1
    ours |= {"text": text, "text_lengths": lengths}
    theirs["encoder_hidden_states"] = text
    if config.family == "pixart":
        mask = torch.arange(num_text_tokens, device=device) < lengths[:, None]
        size = {"resolution": None, "aspect_ratio": None}
        return ours, theirs | {"encoder_attention_mask": mask, "added_cond_kwargs": size}
    pooled = torch.randn(batch, config.pooled_dim, device=device)
    return ours | {"pooled": pooled}, theirs | {"pooled_projections": pooled}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m megadit.interop.bench", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="quickstart", help="name or path of a recipe")
    parser.add_argument("--batch", type=int, help="samples of a step (default: the recipe's batch on one rank)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: the recipe's")
    parser.add_argument("--text-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps to time")
    args = parser.parse_args()
    try:
        chosen = recipe.load(args.recipe)
        batch = args.batch or chosen.training.batch_size // chosen.engine.num_ranks
        precision = args.precision or chosen.training.precision
        table = compare(chosen.model, batch, args.text_tokens, precision, args.pairs)
    except ValueError as error:
        sys.stderr.write(f"megadit: error: {error}\n")
        return 1
    sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
