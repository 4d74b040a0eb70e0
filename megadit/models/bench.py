"""Training speed of our MMDiT beside diffusers' SD3Transformer2DModel of the same sizes, on this machine, in one run.

`python -m megadit.models.bench [RECIPE] [--batch N] [--precision bf16|fp32]`. A step is forward,
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

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from megadit import models, recipe
from megadit.recipe import MMDiTModel


def peer(config: MMDiTModel) -> SD3Transformer2DModel:
    """The diffusers model of the same architecture and sizes."""
    if config.mlp_ratio != 4:
        raise ValueError(f"SD3Transformer2DModel has mlp_ratio 4, not {config.mlp_ratio}")
    return SD3Transformer2DModel(
        sample_size=config.input_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_dim,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.input_size // config.patch_size,
        qk_norm="rms_norm",
    )


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


def compare(config: MMDiTModel, batch: int, num_text_tokens: int, precision: str, num_pairs: int) -> str:
    """The table that the command prints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours, theirs = models.build(config).to(device), peer(config).to(device)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device)
    timestep = 1000 * torch.rand(batch, device=device)
    text = torch.randn(batch, num_text_tokens, config.text_dim, device=device)
    pooled = torch.randn(batch, config.pooled_dim, device=device)
    lengths = torch.arange(batch, device=device) % num_text_tokens + 1  # ours masks; diffusers attends to the padding

    def context() -> AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    pairs = time_pairs(
        training_step(ours, lambda: ours(x, timestep, text=text, text_lengths=lengths, pooled=pooled), context()),
        training_step(theirs, lambda: theirs(x, text, pooled, timestep, return_dict=False)[0], context()),
        num_pairs,
    )
    rows = [("megadit MMDiT", ours, 0), ("diffusers SD3Transformer2DModel", theirs, 1)]
    lines = [
        f"{config.depth} blocks of width {config.width}, {num_text_tokens} text tokens, batch {batch}, {precision}, "
        f"median of {num_pairs} training steps, torch {torch.__version__}, {_machine(device)}",
        f"{'model':<34}{'parameters':>14}{'ms/step':>10}",
    ]
    for name, model, column in rows:
        milliseconds = 1000 * statistics.median(pair[column] for pair in pairs)
        lines.append(f"{name:<34}{sum(p.numel() for p in model.parameters()):>14,}{milliseconds:>10.1f}")
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    lines.append(f"megadit takes {ratio:.2f} steps in the time of one of diffusers")
    return "\n".join(lines)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m megadit.models.bench", description=__doc__)
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
