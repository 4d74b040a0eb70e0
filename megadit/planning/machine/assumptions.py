"""What a plan takes for granted: each number with where it comes from. `megadit plan --assume NAME=VALUE` sets one."""

from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any


def _assumed(value: float, why: str) -> Any:
    return field(default=value, metadata={"why": why})


@dataclass(frozen=True)
class Assumptions:
    """Shares are between 0 and 1; times are in seconds, rates in 10^9 bytes per second."""

    compute_share: float = _assumed(0.57, "of the roof of compute that runs reach: fitted to docs/planning.md")
    compute_share_low: float = _assumed(0.42, "the least of them, but for one outlier; the slow end of ranges")
    compute_share_high: float = _assumed(0.75, "the most of them, but for one outlier; the fast end of ranges")
    block_host_ms: float = _assumed(1.0, "milliseconds in which a CPU starts a block's kernels, forward and backward")
    overlap: float = _assumed(0.9, "of computing time under which collectives can hide")
    link_share: float = _assumed(0.82, "of a node's links that collectives reach: 370 of 450 GB/s (nccl-tests)")
    nic_share: float = _assumed(0.85, "of NICs: 340 of 400 GB/s a node (nccl issue 1218)")
    latency_us: float = _assumed(16, "microseconds for each rank of a ring (nccl issue 1218, fitted)")
    reserved_gib: float = _assumed(4.7, "of a GPU's memory: context, NCCL's buffers, libraries")
    usable_share: float = _assumed(0.92, "of a GPU's memory: the rest goes to fragmentation")
    text_tokens: float = _assumed(120, "of a caption, the longest of a micro-batch")
    latent_bytes: float = _assumed(2, "of a stored latent number (mean and std are two): float16")
    text_bytes: float = _assumed(1, "of a stored number of text features: int8")
    feature_bytes: float = _assumed(1, "of a stored number of REPA's features: int8")
    storage_gb_per_second: float = _assumed(10, "to which checkpoints are written, by all ranks together")
    staging_gb_per_second: float = _assumed(25, "from a GPU to pinned memory (PCIe 5, one direction)")
    gpu_hours_per_failure: float = _assumed(50_700, "Llama 3 (arXiv 2407.21783): 419 stops of 16,384 H100 in 54 days")
    restart_minutes: float = _assumed(10, "from a failure to the first new step")
    dollars_per_gpu_hour: float = _assumed(0, "0: the table's, of machines rented for months")

    @staticmethod
    def parse(settings: Iterable[str]) -> "Assumptions":
        """From NAME=VALUE. Raises ValueError for what is no assumption or no number."""
        known = [each.name for each in fields(Assumptions)]
        found: dict[str, float] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in known:
                raise ValueError(f"--assume {setting}: there is no assumption {name!r}; there are {', '.join(known)}")
            try:
                found[name] = float(text)
            except ValueError:
                raise ValueError(f"--assume {setting}: {text!r} is not a number") from None
            if found[name] < 0:
                raise ValueError(f"--assume {setting}: must not be below 0")
        return replace(Assumptions(), **found)

    def rows(self) -> list[tuple[str, float, str]]:
        """Name, value, and why it is that."""
        return [(each.name, getattr(self, each.name), _why(self, each)) for each in fields(self)]


def _why(assumptions: Assumptions, each: "Field[Any]") -> str:
    return str(each.metadata["why"]) if getattr(assumptions, each.name) == each.default else "set by --assume"
