"""What sharding costs where there is nothing to share: FSDP2 on one rank beside the plain module, in one run.

`python -m megadit.engines.bench [RECIPE] [--batch N] [--pairs N]`. A step is forward, backward, clip and AdamW on
random data. Steps of the two engines alternate, so that both see the same machine; the ratio is the median over pairs.
"""

import argparse
import platform
import statistics
import sys
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megadit import engines
from megadit.engines.base import Engine, process_device
from megadit.recipe import ModelConfig, Recipe, load, parse

TEXT_TOKENS = 16
WARMUP_PAIRS = 2


def compare(recipe: Recipe, batch: int, num_pairs: int) -> str:
    """The lines that the command prints. Needs a process group of one."""
    plain, sharded = (engines.build(_on_one_rank(recipe, kind)) for kind in ("single", "fsdp"))
    inputs = _inputs(recipe.model, batch)
    pairs = []
    for index in range(num_pairs + WARMUP_PAIRS):
        seconds = {}
        for engine in (plain, sharded) if index % 2 else (sharded, plain):
            seconds[engine] = _seconds_of_a_step(engine, inputs)
        pairs.append((seconds[plain], seconds[sharded]))
    pairs = pairs[WARMUP_PAIRS:]
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    device = process_device()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    return "\n".join(
        [
            f"{recipe.name}: {recipe.model.depth} blocks of width {recipe.model.width}, batch {batch}, "
            f"{recipe.training.precision}, median of {num_pairs} training steps, torch {torch.__version__}, "
            f"{machine}, {torch.get_num_threads()} threads",
            *(
                f"{name:<24}{1000 * statistics.median(pair[column] for pair in pairs):>10.1f} ms/step"
                for column, name in enumerate(("plain module", "FSDP2 on one rank"))
            ),
            f"FSDP2 takes {ratio:.3f} times as long",
        ]
    )


def _on_one_rank(recipe: Recipe, kind: str) -> Recipe:
    """The recipe on an engine; what is not the same for both is off."""
    tree = recipe.model_dump(mode="json")
    tree["engine"] |= {"kind": kind, "num_ranks": 1, "num_replicas": 1, "cpu_offload": "none"}
    return parse(tree, recipe.name)


def _seconds_of_a_step(engine: Engine, inputs: dict[str, Any]) -> float:
    start = time.perf_counter()
    engine.train_step([partial(_loss, inputs=inputs)], 1.0)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).float().square().mean(dim=(1, 2, 3))


def _inputs(config: ModelConfig, batch: int) -> dict[str, Any]:
    """Random arguments of the model."""
    device = process_device()
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device)
    inputs: dict[str, Any] = {"x_BCHW": x, "timestep_B": 1000 * torch.rand(batch, device=device)}
    if config.family == "dit":
        return inputs | {"labels": torch.randint(config.num_classes, (batch,), device=device)}
    inputs["text"] = torch.randn(batch, TEXT_TOKENS, config.text_dim, device=device)
    inputs["text_lengths"] = torch.full((batch,), TEXT_TOKENS, device=device)
    if config.family == "mmdit":
        inputs["pooled"] = torch.randn(batch, config.pooled_dim, device=device)
    return inputs


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m megadit.engines.bench", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="quickstart", help="name or path of a recipe")
    parser.add_argument("--batch", type=int, help="samples of a step (default: the recipe's)")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps to time")
    args = parser.parse_args()
    try:
        recipe = load(args.recipe)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        lines = compare(recipe, args.batch or recipe.training.batch_size, args.pairs)
        dist.destroy_process_group()
    except ValueError as error:
        sys.stderr.write(f"megadit: error: {error}\n")
        return 1
    sys.stdout.write(lines + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
