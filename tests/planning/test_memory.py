"""The memory of a rank by arithmetic: published sizes, what is divided by the ranks, what autograd keeps."""

import pytest
import torch

from megadit import models
from megadit.parametrization.table import build_table
from megadit.planning.memory import Memory, activation_bytes, predict
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe, load

TOKENS = 7


def small(name: str, *overrides: str) -> Recipe:
    return load(name, ["engine.kind=single", "engine.num_ranks=1", "training.ema_rates=[0.9]", *overrides])


def on_ranks(num_ranks: int, *overrides: str) -> Memory:
    settings = ("engine.kind=fsdp", f"engine.num_ranks={num_ranks}", "engine.reshard_after_forward=true")
    return predict(load("quickstart", [*settings, "training.ema_rates=[0.9]", *overrides]), num_ranks, TOKENS)


def test_the_18b_model_on_eight_and_sixty_four_ranks() -> None:
    """17.8 billion parameters of 20 bytes, and two of 19 blocks: bf16 weights and fp32 gradients."""
    for num_ranks in (8, 64):
        ways = ["engine.kind=fsdp", f"engine.num_ranks={num_ranks}", "training.ema_rates=[0.9999]"]
        ways += ["engine.activation_checkpointing=full", "training.micro_batch_size=null"]
        ways += ["data.num_streams=64", "training.precision=bf16"]
        ways += ["training.batch_size=64", "training.num_images=64"]
        memory = predict(load("mmdit-18b", ways), num_ranks, 77)
        states = memory.weights + memory.optimizer_state + memory.averages + memory.gradients
        assert states == pytest.approx(20 * 17.8e9 / num_ranks, rel=0.01)
        block = 36 * 5120**2
        assert memory.gathered == pytest.approx(12 * block, rel=0.1)


def test_states_are_divided_by_the_shards_and_what_is_gathered_is_not() -> None:
    one, four = on_ranks(1), on_ranks(4)
    for item in ("weights", "optimizer_state", "averages", "gradients", "activations"):
        assert getattr(four, item) == pytest.approx(getattr(one, item) / 4, rel=1e-3), item
    assert four.gathered == one.gathered
    replicated = on_ranks(4, "engine.num_replicas=2")
    assert replicated.weights == pytest.approx(one.weights / 2, rel=1e-3)


def test_what_each_setting_adds() -> None:
    recipe = small("quickstart")
    total = 4 * sum(torch.Size(spec.shape).numel() for spec in build_table(recipe))
    base = on_ranks(2)
    averages = on_ranks(2, "training.ema_rates=[0.9,0.99]", "training.ema_power_stds=[0.1]").averages
    assert averages == 3 * base.averages
    assert on_ranks(2, "training.micro_batch_size=16").gradients == total  # not reduced before the last micro-batch
    whole = on_ranks(2, "engine.reshard_after_forward=false").gathered - base.gathered
    assert 0 < whole < total
    halves = on_ranks(2, "training.precision=bf16")
    assert (halves.weights, halves.gradients) == (base.weights, base.gradients)
    assert halves.gathered == pytest.approx(base.gathered * 12 / 16, rel=0.05)  # bytes of weights and gradients


@pytest.mark.parametrize("name", ["quickstart", "dit-mup-search-cpu", "pixart-mup-proxy-cpu"])
def test_activations_are_what_autograd_keeps(name: str) -> None:
    """Counted on tensors without memory; here with."""
    recipe = small(name)
    model = models.build(recipe.model)
    batch = synthetic_batch(recipe, 3, TOKENS, torch.device("cpu"))
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        conditions = {name: getattr(batch, name) for name in recipe.model.conditions.columns}
        model(batch.images, batch.timestep_uniform, **conditions)
    found = sum(storage.nbytes() for storage in kept.values())
    assert 3 * activation_bytes(recipe, TOKENS) == pytest.approx(found, rel=0.04)  # of one sample, some are views


def test_checkpointing_keeps_less_of_activations() -> None:
    levels = [f"engine.activation_checkpointing={level}" for level in ("none", "2", "1", "full")]
    none, second, every, full = (
        activation_bytes(small("quickstart", "model.depth=8", level), TOKENS) for level in levels
    )
    assert none > second > every == full
    assert full < none / 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.kind=zero1", "engine.kind zero1 is not predicted; it is for single, fsdp and zero3"),
        ("engine.cpu_offload=all", "not predicted with engine.cpu_offload"),
        ("engine.activation_checkpointing=selective", "not predicted for selective checkpointing"),
    ],
)
def test_what_is_not_covered_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_ranks(2, override)
