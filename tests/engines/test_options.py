"""Options change no number, and a step that is not finite changes nothing at all."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadit import models
from megadit.engines.blocks import prepare_blocks
from megadit.recipe import Recipe

STEPS = 3
OPTIONS = {
    "fsdp": [
        "engine.activation_checkpointing=full",
        "engine.activation_checkpointing=selective",
        "engine.activation_checkpointing=2",
        "engine.cpu_offload=all",
        "training.micro_batch_size=2",
    ],
    "zero1": ["engine.activation_checkpointing=full", "engine.cpu_offload=optimizer", "training.micro_batch_size=2"],
    "zero2": ["engine.activation_checkpointing=selective", "engine.cpu_offload=optimizer"],
    "zero3": [
        "engine.activation_checkpointing=full",
        "engine.activation_checkpointing=selective",
        "engine.cpu_offload=optimizer",
        "engine.cpu_offload=all",
    ],
}


PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def plain(tiny_recipe: Callable[..., Recipe], run_ranks: Callable) -> dict[str, Any]:
    """The single process without any option."""
    ((found,),) = run_ranks("engine_steps.py", 1, jobs=[(tiny_recipe(), None)], num_steps=STEPS)
    return found


@pytest.fixture(scope="module", params=OPTIONS)
def runs(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe], run_ranks: Callable) -> dict[str, Any]:
    """What both ranks of an engine found, by option and by precision of a run with a broken step."""
    kind = request.param
    base = (f"engine.kind={kind}", "engine.num_ranks=2")
    jobs = {option: (tiny_recipe(*base, option), None) for option in OPTIONS[kind]}
    jobs |= {precision: (tiny_recipe(*base, f"training.precision={precision}"), 1) for precision in PRECISIONS}
    ranks = run_ranks("engine_steps.py", 2, jobs=list(jobs.values()), num_steps=STEPS)
    return dict(zip(jobs, zip(*ranks, strict=True), strict=True))


def test_options_change_no_number(runs: dict[str, Any], plain: dict[str, Any]) -> None:
    for option, ranks in runs.items():
        if option in PRECISIONS:
            continue
        for step in range(STEPS):
            losses = torch.cat([rank["losses"][step] for rank in ranks])
            assert losses.tolist() == pytest.approx(plain["losses"][step].tolist(), rel=1e-4), option
            for rank in ranks:
                assert rank["norms"][step] == pytest.approx(plain["norms"][step], rel=1e-4), option


@pytest.mark.parametrize(("num_ranks", "num_replicas"), [(2, 1), (2, 2), (4, 2)])
def test_gradients_of_micro_batches_are_kept_as_shards_or_whole(
    num_ranks: int, num_replicas: int, tiny_recipe: Callable[..., Recipe], run_ranks: Callable, plain: dict[str, Any]
) -> None:
    """The curve is that of the single process without micro-batches, and the collectives are as the setting says."""
    settings = ["engine.kind=fsdp", f"engine.num_ranks={num_ranks}", f"engine.num_replicas={num_replicas}"]
    ways, num_micro_batches = ("sharded", "whole"), 2
    settings += [f"training.micro_batch_size={16 // num_ranks // num_micro_batches}"]
    jobs = [(tiny_recipe(*settings, f"engine.accumulation={way}"), None) for way in ways]
    ranks = run_ranks("engine_steps.py", num_ranks, jobs=jobs, num_steps=STEPS, num_replicas=num_replicas)
    for found in zip(*ranks, strict=True):
        for step in range(STEPS):
            losses = torch.cat([rank["losses"][step] for rank in found])
            assert losses.tolist() == pytest.approx(plain["losses"][step].tolist(), rel=1e-4)
        assert all(rank["norms"] == pytest.approx(plain["norms"], rel=1e-5) for rank in found)
    units = 2 + 1  # the blocks, and what is in none
    for sharded, whole in ranks:
        for name, weights in sharded["states"][-1][0].items():
            torch.testing.assert_close(weights, whole["states"][-1][0][name], rtol=1e-4, atol=1e-6)
        if num_ranks > num_replicas:
            assert sharded["collectives"]["_reduce_scatter_base_"] == STEPS * units * num_micro_batches
            assert whole["collectives"]["_reduce_scatter_base_"] == STEPS * units
        assert sharded["collectives"]["allreduce_"] == whole["collectives"]["allreduce_"]  # over replicas once a step


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loss_that_is_not_finite_skips_the_step_on_every_rank(runs: dict[str, Any], precision: str) -> None:
    for found in runs[precision]:
        assert found["skipped"] == [False, True, False]
        assert not found["norms"][1] < float("inf")
        assert found["norms"][2] < float("inf")
        before, skipped, after = found["states"]
        for parts, same, later in zip(before, skipped, after, strict=True):
            assert all(torch.equal(parts[name], same[name]) for name in parts)
            assert any(not torch.equal(parts[name], later[name]) for name in parts)


def products_and_norms(level: str, tiny_recipe: Callable[..., Recipe]) -> tuple[int, int]:
    """How many matrix products and layer norms a backward pass of the four blocks of a plain model runs."""
    recipe = tiny_recipe("model.depth=4", f"engine.activation_checkpointing={level}")
    torch.manual_seed(0)
    model = models.build(recipe.model)
    prepare_blocks(model, recipe.engine)
    text = {"text": torch.randn(2, 3, 384), "text_lengths": torch.tensor([3, 2]), "pooled": torch.randn(2, 384)}
    prediction = model(torch.randn(2, 3, 16, 16), torch.tensor([100.0, 900.0]), **text)
    with Counter() as counter:
        prediction.square().mean().backward()
    aten = torch.ops.aten
    return counter[aten.mm] + counter[aten.addmm], counter[aten.native_layer_norm]


class Counter(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: collections.Counter[Any] = collections.Counter()

    def __getitem__(self, op: Any) -> int:
        return self._counts[op]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[op.overloadpacket] += 1
        return op(*args, **(kwargs or {}))


def test_what_the_levels_compute_again(tiny_recipe: Callable[..., Recipe]) -> None:
    found = {level: products_and_norms(level, tiny_recipe) for level in ("none", "selective", "full", "1", "2")}
    products, norms = found["none"]
    assert norms == 0
    assert found["selective"][0] == products
    assert found["selective"][1] > 0
    assert found["full"] == found["1"]
    assert found["full"][0] > products
    assert found["2"][0] - products == pytest.approx((found["full"][0] - products) / 2, abs=3)  # the last block is less


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("engine.cpu_offload=all",), "cpu_offload all is not possible with kind single: one process updates"),
        (("engine.kind=fsdp", "engine.cpu_offload=optimizer"), "FSDP2 moves weights, gradients and optimizer state"),
        (("engine.kind=zero2", "engine.cpu_offload=all"), "it keeps whole weights on the device; use zero3 or fsdp"),
        (("engine.kind=zero3", "engine.compile=true"), "hooks gather weights inside the blocks"),
        (("engine.kind=zero1", "engine.num_ranks=2", "engine.num_replicas=2"), "num_replicas 2 needs kind fsdp"),
        (
            ("engine.kind=fsdp", "engine.num_ranks=2", "engine.num_replicas=4"),
            "num_replicas 4 must divide num_ranks: 2",
        ),
        (("engine.kind=zero2", "engine.accumulation=whole"), "accumulation whole needs kind fsdp; zero2 has one way"),
        (("engine.activation_checkpointing=0",), "greater than or equal to 1|at least 1|none"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    overrides: tuple[str, ...], said: str, tiny_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_recipe(*overrides)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("kind", ["fsdp", "zero2"])
def test_compiled_blocks_give_the_same_numbers(
    kind: str, tiny_recipe: Callable[..., Recipe], run_ranks: Callable, plain: dict[str, Any]
) -> None:
    """With checkpointing inside, and captions of several lengths."""
    options = ("engine.num_ranks=1", "engine.compile=true", "engine.activation_checkpointing=selective")
    recipe = tiny_recipe(f"engine.kind={kind}", *options)
    ((found,),) = run_ranks("engine_steps.py", 1, jobs=[(recipe, None)], num_steps=STEPS, limit_seconds=900)
    for step in range(STEPS):
        assert found["losses"][step].tolist() == pytest.approx(plain["losses"][step].tolist(), rel=1e-4)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-4)
