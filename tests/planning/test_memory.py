"""The memory of a rank by arithmetic: published sizes, what is divided by the ranks, what torch's allocator gives."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, AutoModelForTextEncoding

from megadit import models
from megadit.engines.blocks import prepare_blocks
from megadit.parametrization.table import build_table
from megadit.planning.memory import Memory, predict
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe, load

TOKENS = 7
GIB = 2**30


def small(name: str, *overrides: str) -> Recipe:
    return load(name, ["engine.kind=single", "engine.num_ranks=1", "training.ema_rates=[0.9]", *overrides])


def on_ranks(num_ranks: int, *overrides: str, text_tokens: int = TOKENS) -> Memory:
    settings = ("engine.kind=fsdp", f"engine.num_ranks={num_ranks}", "engine.reshard_after_forward=true")
    recipe = load("quickstart", [*settings, "training.ema_rates=[0.9]", "checkpoints.asynchronous=false", *overrides])
    return predict(recipe, num_ranks, text_tokens)


def large(num_ranks: int, *overrides: str) -> Memory:
    """The 18B model with as many samples on each rank, in bf16."""
    settings = ["engine.kind=fsdp", f"engine.num_ranks={num_ranks}", "training.ema_rates=[0.9999]"]
    settings += ["engine.activation_checkpointing=full", "training.micro_batch_size=null", "data.num_streams=1024"]
    settings += ["engine.num_replicas=1", "hardware=null"]
    settings += ["training.precision=bf16", "training.batch_size=1024", "training.num_images=1024"]
    return predict(load("mmdit-18b", [*settings, *overrides]), num_ranks, 77)


def most(memory: Memory, *names: str) -> int:
    """The most bytes of these items on the device at any moment."""
    return max(sum(i.device_bytes for i in items if i.name in names) for items in memory.moments.values())


def test_the_18b_model_on_eight_and_sixty_four_ranks() -> None:
    """17.8 billion parameters of 20 bytes; and of two blocks the bf16 weights, of one the bf16 gradients, while those
    of the one before are reduced in fp32."""
    for num_ranks in (8, 64):
        memory = large(num_ranks)
        states = most(memory, "weights", "optimizer state", "averages") + most(memory, "gradients")
        assert states == pytest.approx(20 * 17.8e9 / num_ranks, rel=0.01)
        block = 36 * 5120**2
        assert most(memory, "gathered weights", "gradients in flight") == pytest.approx(10 * block, rel=0.1)


def test_gradients_of_micro_batches_are_whole_or_shares() -> None:
    """Whole ones of 18 billion parameters are 66 GiB, on however many ranks."""
    micro = "training.micro_batch_size=1"
    for num_ranks in (64, 256):
        whole, sharded = (large(num_ranks, micro, f"engine.accumulation={way}") for way in ("whole", "sharded"))
        assert most(whole, "gradients") / GIB == pytest.approx(66, rel=0.01)
        assert most(sharded, "gradients") / GIB == pytest.approx(66 / num_ranks, rel=0.01)
        assert sharded.peak < whole.peak - 50 * GIB


def test_states_are_divided_by_the_shards_and_what_is_gathered_is_not() -> None:
    one, four = on_ranks(1), on_ranks(4)
    for item in ("weights", "optimizer state", "averages", "gradients", "activations"):
        assert most(four, item) == pytest.approx(most(one, item) / 4, rel=0.03), item
    two = on_ranks(2)
    assert most(four, "gathered weights") == most(two, "gathered weights")
    replicated = on_ranks(4, "engine.num_replicas=2")
    assert most(replicated, "weights") == most(two, "weights")


def test_what_each_setting_adds() -> None:
    recipe = small("quickstart")
    total = 4 * sum(torch.Size(spec.shape).numel() for spec in build_table(recipe))
    base = on_ranks(2)
    averages = on_ranks(2, "training.ema_rates=[0.9,0.99]", "training.ema_power_stds=[0.1]")
    assert most(averages, "averages") == 3 * most(base, "averages")
    kept = on_ranks(2, "engine.reshard_after_forward=false")
    assert most(kept, "gathered weights") == total
    halves = on_ranks(2, "training.precision=bf16")
    assert most(halves, "weights") == most(base, "weights")
    assert most(halves, "gathered weights") == most(base, "gathered weights") / 2


def test_what_is_offloaded_is_held_by_the_host() -> None:
    whole = on_ranks(2, "engine.kind=zero2")
    optimizer = on_ranks(2, "engine.kind=zero2", "engine.cpu_offload=optimizer")
    everything = on_ranks(2, "engine.cpu_offload=all")
    states = most(whole, "weights", "optimizer state", "averages")
    assert whole.host_peak == 0
    assert most(optimizer, "weights", "optimizer state", "averages", "gradients") == 0
    assert most(optimizer, "weights of the matrix products") == most(whole, "weights of the matrix products")
    assert optimizer.host_peak > states
    assert everything.host_peak >= states
    assert most(everything, "weights", "optimizer state", "averages", "gradients") == 0


def test_an_asynchronous_checkpoint_is_staged_in_pinned_memory() -> None:
    """As much as the state, in blocks of a power of two."""
    state = most(on_ranks(2), "weights", "optimizer state", "averages")
    staged = on_ranks(2, "checkpoints.asynchronous=true")
    assert state < staged.host_peak < 2 * state
    assert staged.peak == on_ranks(2).peak


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        pytest.param("dit-mup-search-cpu", marks=pytest.mark.slow),
        pytest.param("pixart-mup-proxy-cpu", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("level", ["none", "full", "3", "selective"])
def test_a_single_process_takes_what_torchs_allocator_gives(name: str, level: str) -> None:
    """Gradients and activations of a plain model, forward and back with memory, as the profiler records them.

    A block's gradients are counted from the beginning of its backward pass, which is too much by up to a tenth here.
    """
    sizes = ("model.depth=8", "training.batch_size=16", "training.num_images=16", "data.num_streams=1")
    base = ("parametrization.base_shapes=null", "parametrization.base_width=64")
    recipe = small(name, f"engine.activation_checkpointing={level}", *sizes, *base)
    predicted, found = most(predict(recipe, 1, TOKENS), "gradients", "activations"), allocated_bytes(recipe, 16)
    assert 0.99 * found <= predicted <= 1.11 * found


def allocated_bytes(recipe: Recipe, num_samples: int) -> int:
    """The most that is allocated at once while a plain model goes forward and back, beside the model and its inputs."""
    model = models.build(recipe.model)
    prepare_blocks(model, recipe.engine)
    batch = synthetic_batch(recipe, num_samples, TOKENS, torch.device("cpu"))
    conditions = {name: getattr(batch, name) for name in recipe.model.conditions.columns}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(batch.images, batch.timestep_uniform, **conditions).square().mean().backward()
    recorded = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(recorded, key=lambda event: event.start_ns())))


def test_encoders_are_counted_from_their_configurations(
    t5_folder: Path, vae_folder: Path, repa: list[str], tiny_recipe: Callable[..., Recipe]
) -> None:
    text = sum(p.numel() for p in AutoModelForTextEncoding.from_pretrained(t5_folder).parameters())
    settings = ["engine.kind=fsdp", "engine.num_ranks=2"]
    whole, shared = (
        predict(tiny_recipe(*settings, f"encoders={{text: {t5_folder}, sharded: {way}}}"), 2, TOKENS)
        for way in ("false", "true")
    )
    assert most(whole, "text encoder") == 4 * text
    assert most(shared, "text encoder") == pytest.approx(2 * text, rel=0.01)
    aligned = tiny_recipe(*repa)
    image = sum(p.numel() for p in AutoModel.from_pretrained(aligned.objective.image_encoder).parameters())
    assert most(predict(aligned, 1, TOKENS), "image encoder") == 4 * image
    rounded = tiny_recipe(*repa, "training.precision=bf16")
    assert most(predict(rounded, 1, TOKENS), "image encoder") == 2 * image
    assert most(predict(tiny_recipe(f"encoders={{vae: {vae_folder}}}"), 1, TOKENS), "autoencoder") > 0
    with pytest.raises(ValueError, match="text encoder elsewhere: no such folder, so its size is not known"):
        predict(tiny_recipe("encoders={text: elsewhere}", "model.text_dim=100"), 1, TOKENS)


@pytest.mark.slow
def test_the_18b_model_is_planned_in_little_memory() -> None:
    script = """
import resource
from megadit.planning.memory import predict
from megadit.recipe import load
recipe = load("mmdit-18b", ["engine.num_replicas=32", "data.num_streams=1024", "engine.num_ranks=1024",
    "training.micro_batch_size=4"])
assert predict(recipe, 1024, 77).peak < 80e9
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    found = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) * 1024 < 1e9
