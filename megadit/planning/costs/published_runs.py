"""Published speeds of training beside what the planner's roof says of them: where `compute_share` comes from.

Taken are runs whose GPU, model, tokens and parallelism are stated, of diffusion transformers and, as there are few of
these, of dense transformers trained by FSDP. Not taken: runs that decode pictures as they train, that do not say how
many GPUs they had, or whose products are in FP8.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any

from megadit.planning.costs.roof import Work, micro_batch_work, moved_bytes
from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.machine.gpus import GPUS
from megadit.planning.markdown import markdown
from megadit.recipe import load


@dataclass(frozen=True)
class Published:
    """One run, in units of one GPU."""

    name: str
    gpu: str
    unit: str  # what is counted per second
    rate: float  # as published
    source: str
    work: Work  # of one unit


@dataclass(frozen=True)
class Comparison:
    """What the planner says of a published run."""

    run: Published
    roof: float  # units a second
    share: float  # of the roof that the run reached
    predicted: float
    low: float
    high: float
    error: float  # (predicted - published) / published
    error_left_out: float  # with the share fitted to all the others

    @property
    def in_range(self) -> bool:
        return self.low <= self.run.rate <= self.high


def _transformer(
    params: float,
    width: int,
    depth: int,
    head_dim: int,
    length: int,
    *,
    causal: bool = False,
    again: float = 0.0,
    moved_again: float | None = None,
    compiled: bool = True,
    tokens: float = 1.0,
) -> Work:
    """Of `tokens` tokens of a dense transformer in bf16: 6 FLOPs a parameter, and attention to all others."""
    attention = (3 + again) * 4 * length * width * depth * (0.5 if causal else 1) * tokens
    linear = 2 * (3 + again) * params * tokens
    moved = moved_bytes(tokens, depth, width, "bf16", compiled, again if moved_again is None else moved_again)
    return Work(linear, attention, width, head_dim, length, moved, "bf16")


def _dit_xl(*, compiled: bool, again: float = 0.0) -> Work:
    """Of one picture of 256 tokens."""
    level = "full" if again else "none"
    overrides = ["training.precision=bf16", f"engine.compile={str(compiled).lower()}"]
    return micro_batch_work(load("dit-xl2-sp", [*overrides, f"engine.activation_checkpointing={level}"]), 1, 0)


def published() -> list[Published]:
    """The runs."""
    llama: dict[str, Any] = {
        "params": 8.03e9 - 0.53e9,
        "width": 4096,
        "depth": 32,
        "head_dim": 128,
        "length": 8192,
        "causal": True,
    }
    wan: dict[str, Any] = {
        "params": 14.0e9,
        "width": 5120,
        "depth": 40,
        "head_dim": 128,
        "length": 37_440,
        "again": 1.0,
    }
    wan_flops = 6 * 14.0e9 + 12 * 37_440 * 5120 * 40  # of a token, as NeMo counts TFLOP/s: without recomputation
    titan = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
    nemo = "NeMo DFM, docs/performance-summary.md"
    return [
        Published(
            "DiT-XL/2, 1 A100, eager, checkpointing",
            "a100",
            "images",
            107.5,
            "fast-DiT, README: 0.84 steps/s of 128",
            _dit_xl(compiled=False, again=1),
        ),
        Published(
            "LightningDiT-XL/1, 8 H800, compiled",
            "h100",
            "images",
            285,
            "LightningDiT, README: 64 epochs in about 10 h",
            _dit_xl(compiled=True),
        ),
        Published(
            "Llama 3 8B, 8 H100, eager",
            "h100",
            "tokens",
            5762,
            titan,
            _transformer(**llama, moved_again=1, compiled=False),
        ),
        Published("Llama 3 8B, 8 H100, compiled", "h100", "tokens", 6667, titan, _transformer(**llama, moved_again=1)),
        Published(
            "Llama 3 8B, 128 H100, eager",
            "h100",
            "tokens",
            5605,
            titan,
            _transformer(**llama, moved_again=1, compiled=False),
        ),
        Published(
            "Llama 3 8B, 128 H100, compiled", "h100", "tokens", 6514, titan, _transformer(**llama, moved_again=1)
        ),
        Published("Wan 2.1 14B, 128 H100, Megatron", "h100", "tokens", 325.8e12 / wan_flops, nemo, _transformer(**wan)),
        Published("Wan 2.1 14B, 64 H100, FSDP", "h100", "tokens", 228.9e12 / wan_flops, nemo, _transformer(**wan)),
        Published("Wan 2.1 14B, 8 H100, FSDP", "h100", "tokens", 175.9e12 / wan_flops, nemo, _transformer(**wan)),
    ]


def comparisons(assumed: Assumptions) -> list[Comparison]:
    """Each run beside its prediction."""
    runs = published()
    roofs = [1 / run.work.seconds(GPUS[run.gpu]) for run in runs]
    shares = [run.rate / roof for run, roof in zip(runs, roofs, strict=True)]
    found = []
    for place, (run, roof, share) in enumerate(zip(runs, roofs, shares, strict=True)):
        others = median(shares[:place] + shares[place + 1 :])
        found.append(
            Comparison(
                run=run,
                roof=roof,
                share=share,
                predicted=roof * assumed.compute_share,
                low=roof * assumed.compute_share_low,
                high=roof * assumed.compute_share_high,
                error=assumed.compute_share / share - 1,
                error_left_out=others / share - 1,
            )
        )
    return found


def median_error(assumed: Assumptions, left_out: bool = False) -> float:
    """Of the predictions, relative to what was published; `left_out`: each by what was fitted to the others."""
    found = comparisons(assumed)
    return median(abs(each.error_left_out if left_out else each.error) for each in found)


def table_of_published(assumed: Assumptions) -> str:
    """Markdown: each run beside its prediction, per GPU."""
    header = ("run", "published", "predicted", "range", "error", "error, left out", "of the roof", "source")
    rows = [
        (
            each.run.name,
            f"{each.run.rate:,.0f} {each.run.unit}/s",
            f"{each.predicted:,.0f}",
            f"{each.low:,.0f} to {each.high:,.0f}{'' if each.in_range else ' (outside)'}",
            f"{each.error:+.0%}",
            f"{each.error_left_out:+.0%}",
            f"{each.share:.2f}",
            each.run.source,
        )
        for each in comparisons(assumed)
    ]
    return markdown(header, rows)
