"""How long a step takes, and how much of it is waiting for the network: facts in, arithmetic, a range out."""

from dataclasses import dataclass

from megadit.planning.collectives import Collective, collectives
from megadit.planning.costs.roof import micro_batch_work, optimizer_seconds
from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.machine.network import Network
from megadit.recipe import Recipe


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on."""

    compute: float
    exposed: float  # waiting for collectives that computing does not hide
    optimizer: float
    communication: float  # of all collectives, hidden or not

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def exposed_share(self) -> float:
        return self.exposed / self.total


def step_time(
    recipe: Recipe, network: Network, assumed: Assumptions, num_parameters: int, compute_share: float
) -> StepTime:
    """Of a recipe on a network, where runs reach `compute_share` of the roof.

    Gathers and reductions of a micro-batch hide under `assumed.overlap` of its computing, sums over replicas under that
    of the last one. Not hidden: the first gather and the last reduction, a block's each.
    """
    num_ranks = network.num_gpus
    samples = recipe.training.batch_size // num_ranks
    micro_batch = recipe.training.micro_batch_size or samples
    num_micro_batches = samples // micro_batch
    work = micro_batch_work(recipe, micro_batch, int(assumed.text_tokens))
    starting = 1e-3 * assumed.block_host_ms * recipe.model.depth  # small models wait for the CPU
    compute = max(work.seconds(network.gpu) / compute_share, starting)
    calls = known_collectives(recipe, num_ranks)
    seconds = {call: network.seconds(call) for call in calls}
    last = sum(took for call, took in seconds.items() if call.axis != "shard")
    every = sum(seconds.values()) - last
    per_micro_batch = every / num_micro_batches
    edges = sum(took / call.num_calls for call, took in _largest(seconds).items())
    exposed = 0.0
    for place in range(num_micro_batches):
        own = per_micro_batch + (last if place == num_micro_batches - 1 else 0)
        exposed += max(0.0, own - assumed.overlap * compute)
    exposed = min(sum(seconds.values()), exposed + edges)
    num_shards = 1 if recipe.engine.kind == "single" else num_ranks // recipe.engine.num_replicas
    update = optimizer_seconds(recipe, num_parameters / num_shards, network.gpu)
    return StepTime(num_micro_batches * compute, exposed, update, sum(seconds.values()))


def known_collectives(recipe: Recipe, num_ranks: int) -> list[Collective]:
    """Those of the engine; DeepSpeed's are taken for those of FSDP2, which sends the same weights and gradients."""
    kind = recipe.engine.kind
    if kind in ("single", "fsdp"):
        return collectives(recipe, num_ranks)
    changes = {"kind": "fsdp", "num_replicas": 1, "reshard_after_forward": kind == "zero3", "cpu_offload": "none"}
    engine = recipe.engine.model_copy(update=changes)
    return collectives(recipe.model_copy(update={"engine": engine}), num_ranks)


def _largest(seconds: dict[Collective, float]) -> dict[Collective, float]:
    """Of gathers and of reductions, the calls that move most: those of a block."""
    found: dict[str, tuple[Collective, float]] = {}
    for call, took in seconds.items():
        if call.axis == "shard" and (call.kind not in found or call.num_bytes > found[call.kind][0].num_bytes):
            found[call.kind] = call, took
    return dict(found.values())
