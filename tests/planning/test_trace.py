"""Formulas against traces of the real engine, and both against what real ranks ask of gloo and hold."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megadit.planning.collectives import STOP_FLAG, Collective, collectives
from megadit.planning.flops import step_flops
from megadit.planning.trace import Traced, compare, trace
from megadit.recipe import Recipe, load

TOKENS = 5
OPERATIONS = {"all_gather": "_allgather_base_", "reduce_scatter": "_reduce_scatter_base_", "all_reduce": "allreduce_"}
SIZES = ("model.depth=2", "parametrization={kind: sp}")
MMDIT_SIZES = (*SIZES, "model.repa.block=1")
FIVE = ("training.batch_size=40", "training.num_images=40", "training.micro_batch_size=1")
SHIPPED = ("dit-xl2-mup", "pixart-mup", "mmdit-18b")


def on(name: str, num_ranks: int, *overrides: str) -> tuple[Recipe, int, int]:
    """A shipped recipe on so many ranks, with two samples for each; a job of tests/workers/trace.py."""
    batch = 2 * num_ranks
    settings = [f"training.batch_size={batch}", f"training.num_images={batch}", f"data.num_streams={num_ranks}"]
    settings += [f"hardware={{gpu: h100, num_nodes: 1, gpus_per_node: {num_ranks}}}", "engine.num_ranks=1"]
    settings += ["training.micro_batch_size=2"]
    return load(name, [*settings, *overrides]), num_ranks, TOKENS


def assert_agree(jobs: Sequence[tuple[Recipe, int, int]], traced: Sequence[Traced]) -> None:
    for (recipe, num_ranks, tokens), found in zip(jobs, traced, strict=True):
        assert list(found.collectives) == collectives(recipe, num_ranks), (recipe.name, recipe.engine)
        assert found.flops == step_flops(recipe, num_ranks, tokens).computed, (recipe.name, recipe.engine)


def test_formulas_are_what_the_engine_asks_for(run_ranks: Callable) -> None:
    """Shipped widths, two blocks deep: every count, byte and FLOP. Of five micro-batches three are traced."""
    jobs = [
        on("dit-xl2-mup", 1024, "engine.num_replicas=32", *SIZES),
        on("pixart-mup", 8, "engine.num_replicas=4", "engine.activation_checkpointing=2", *SIZES),
        on("mmdit-18b", 64, "engine.activation_checkpointing=selective", *MMDIT_SIZES),
        on("dit-xl2-mup", 8, *FIVE, "engine.accumulation=whole", "engine.reshard_after_forward=false", *SIZES),
        on("dit-xl2-mup", 8, *FIVE, *SIZES),
        on("pixart-mup", 1, "engine.kind=single", *SIZES),
        on("pixart-mup", 1, *SIZES),
        on("dit-xl2-mup", 4, "engine.num_replicas=4", *SIZES),
    ]
    (traced,) = run_ranks("trace.py", 1, jobs=jobs)
    assert_agree(jobs, traced)


@pytest.mark.slow
def test_formulas_hold_at_full_depth(run_ranks: Callable) -> None:
    """The shipped models whole, on one rank, 8, 64, and 1024 in two ways."""
    jobs = []
    for name in SHIPPED:
        jobs += [
            on(name, 1, "engine.kind=single"),
            on(name, 8, "engine.num_replicas=2", "engine.activation_checkpointing=full"),
            on(name, 64, "engine.activation_checkpointing=selective"),
            on(name, 1024, "engine.num_replicas=32", "training.micro_batch_size=1"),
            on(name, 1024),
        ]
    (traced,) = run_ranks("trace.py", 1, jobs=jobs, limit_seconds=600)
    assert_agree(jobs, traced)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_formulas_are_what_real_ranks_ask_for(tiny_recipe: Callable, run_ranks: Callable, num_ranks: int) -> None:
    """With widths that do not divide by the ranks, so that shards are padded."""
    uneven = ["model.width=60", "model.head_dim=10", "parametrization={kind: sp}", "engine.kind=fsdp"]
    bf16 = ("training.precision=bf16", "engine.activation_checkpointing=full")
    shards, whole = ("training.micro_batch_size=2",), ("training.micro_batch_size=2", "engine.accumulation=whole")
    replicas = ("engine.num_replicas=2", "engine.num_ranks=4")
    ways = {
        2: [(), ("engine.reshard_after_forward=false",), shards],
        4: [bf16, whole, (*replicas, *bf16), (*replicas, *shards), (*replicas, *whole)],
    }
    recipes = [tiny_recipe(*uneven, *way) for way in ways[num_ranks]]
    for rank, counted in enumerate(run_ranks("one_step.py", num_ranks, recipes=recipes)):
        for recipe, (found, _) in zip(recipes, counted, strict=True):
            expected = as_operations(collectives(recipe, num_ranks), num_ranks, recipe.engine.num_replicas)
            assert found == expected, (rank, recipe.engine)


def test_a_step_of_the_trainer_adds_the_stop_flag(tiny_recipe: Callable, run_ranks: Callable, tmp_path: Path) -> None:
    """The difference between a run of two steps and one of three; neither writes a line of the log between."""

    def counted(num_steps: int) -> Counter:
        length = [f"training.num_images={16 * num_steps}", "training.log_every_steps=100", "validation=null"]
        recipe = tiny_recipe("engine.kind=fsdp", "engine.num_ranks=2", *length)
        found, _ = run_ranks("one_step.py", 2, recipes=[recipe], run=tmp_path / str(num_steps))
        return found[0][0]

    formula = [*collectives(tiny_recipe("engine.kind=fsdp", "engine.num_ranks=2"), 2), STOP_FLAG]
    assert counted(3) - counted(2) == as_operations(formula, 2, 1)


def test_the_peak_is_what_torch_tracks_on_real_ranks(tiny_recipe: Callable, run_ranks: Callable) -> None:
    """torch's MemTracker on tensors with memory. Averages of the weights are the trace's own."""
    sizes = [
        "training.batch_size=32",
        "training.num_images=32",
        "model.width=128",
        "engine.kind=fsdp",
        "training.ema_rates=[]",
    ]
    ways = {
        "bf16": ("training.precision=bf16",),
        "selective": ("engine.activation_checkpointing=selective",),
        "kept": ("engine.reshard_after_forward=false",),
    }
    recipes = [tiny_recipe(*sizes, "engine.num_ranks=2", *way) for way in ways.values()]
    first, _ = run_ranks("one_step.py", 2, recipes=recipes, with_memory=True)
    (traced,) = run_ranks("trace.py", 1, jobs=[(recipe, 2, TOKENS) for recipe in recipes])
    peaks = {way: (found.peak_bytes, peak) for way, found, (_, peak) in zip(ways, traced, first, strict=True)}
    for ours, theirs in peaks.values():
        assert ours == pytest.approx(theirs, rel=0.01), peaks


def as_operations(formula: Sequence[Collective], num_ranks: int, num_replicas: int) -> Counter:
    """(operation, bytes, ranks of the group) -> calls."""
    ranks = {"shard": num_ranks // num_replicas, "replicate": num_replicas, "all": num_ranks}
    calls: Counter = Counter()
    for one in formula:
        calls[OPERATIONS[one.kind], one.num_bytes // one.num_calls, ranks[one.axis]] += one.num_calls
    return calls


def test_a_trace_has_a_process_of_its_own(tiny_recipe: Callable) -> None:
    recipe = tiny_recipe("engine.kind=fsdp", "engine.num_ranks=4")
    rows = {(row.what, row.unit): row for row in compare(recipe, 4, TOKENS)}
    assert list(rows)[-2:] == [("FLOPs", "FLOP"), ("peak of memory", "bytes")]
    gathered = rows["all_gather over shard", "calls"]
    assert (gathered.formula, gathered.traced, gathered.difference) == (5, 5, 0)
    assert all(row.difference == 0 for (what, _), row in rows.items() if what != "peak of memory")


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "message"),
    [
        (2, ["engine.kind=zero3"], "engine.kind zero3 cannot be traced: DeepSpeed"),
        (2, ["engine.kind=fsdp", "engine.cpu_offload=all"], "engine.cpu_offload cannot be traced"),
        (2, [], "engine.kind single runs on one rank, not 2"),
        (3, ["engine.kind=fsdp"], "3 ranks do not divide data.num_streams 4"),
        (
            3,
            ["engine.kind=fsdp", "engine.num_replicas=2", "engine.num_ranks=2"],
            "num_replicas 2 does not divide the 3 ranks",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused(
    tiny_recipe: Callable, num_ranks: int, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trace(tiny_recipe(*overrides), num_ranks)
