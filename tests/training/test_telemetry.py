"""Where the time goes adds up to the time that passed, and the numbers of a line are those of its steps."""

import math
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from megadit.distributed import ALONE, Axis, Topology
from megadit.parametrization.table import build_table
from megadit.planning.flops import training_flops
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe, plan
from megadit.training import peak_memory
from megadit.training.reporter import banner
from megadit.training.telemetry import PHASES, STEP_PHASES, Telemetry

CPU = torch.device("cpu")


def test_the_phases_add_up_to_the_time_that_passed(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    heard: list[str] = []
    telemetry = Telemetry(recipe, ALONE, heard.append)
    batch = synthetic_batch(recipe, 4, 5, CPU)
    started = time.perf_counter()
    for _ in range(3):
        telemetry.begin("data")
        time.sleep(0.01)
        telemetry.begin("forward")
        time.sleep(0.02)
        telemetry.count(batch)
    telemetry.begin("validation")
    time.sleep(0.03)
    telemetry.begin("data")
    costs = telemetry.take()
    passed = time.perf_counter() - started
    assert heard == ["data", "forward"] * 3 + ["validation", "data"]
    assert costs.num_steps == 3
    assert sum(costs.seconds.values()) * 3 == pytest.approx(passed, abs=0.005)
    assert costs.seconds["forward"] > costs.seconds["data"] > 0
    assert costs.seconds["validation"] >= 0.01
    assert costs.seconds["backward"] == costs.seconds["checkpoint"] == 0
    training = 3 * (sum(costs.seconds.values()) - costs.seconds["validation"])
    assert costs.images_per_second == pytest.approx(12 / training)
    patches = (recipe.model.input_size // recipe.model.patch_size) ** 2
    assert costs.tokens_per_second == pytest.approx(12 * (patches + 5) / training)
    assert costs.flops_per_second == pytest.approx(3 * training_flops(recipe.model, [5] * 4) / training)
    assert costs.mfu is None  # nobody knows the peak of this CPU
    assert costs.data_stalls == 3  # each waited for half as long as it computed

    telemetry.begin("forward")
    telemetry.count(batch)
    assert telemetry.take().num_steps == 1


def test_an_optimizer_begins_its_phase(tiny_recipe: Callable[..., Recipe]) -> None:
    heard: list[str] = []
    telemetry = Telemetry(tiny_recipe(), ALONE, heard.append)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    with telemetry.watching_optimizers():
        telemetry.timed(lambda model: model.sum())(weight).backward()
        optimizer.step()
    optimizer.step()
    assert heard == ["forward", "backward", "optimizer"]


@pytest.mark.parametrize(
    "way",
    [
        (),
        ("engine.kind=fsdp", "engine.num_ranks=2"),
        ("engine.kind=zero3", "engine.num_ranks=2"),
        pytest.param(("engine.kind=zero1", "engine.num_ranks=2"), marks=pytest.mark.slow),
        pytest.param(("engine.kind=zero2", "engine.num_ranks=2"), marks=pytest.mark.slow),
        pytest.param(("engine.kind=fsdp", "engine.num_ranks=4", "engine.num_replicas=2"), marks=pytest.mark.slow),
        pytest.param(
            ("engine.kind=zero2", "engine.num_ranks=2", "engine.cpu_offload=optimizer", "training.micro_batch_size=4"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["single", "fsdp", "zero3", "zero1", "zero2", "hsdp", "zero2 offloaded, accumulating"],
)
def test_a_line_of_training_says_what_its_steps_cost(way: tuple[str, ...], finished: Callable) -> None:
    six = ("training.num_images=96", "training.log_every_steps=3", "checkpoints.every_images=48", "validation=null")
    lines = finished(*six, *way).lines("train")
    expected = {
        line["step"]: {key: value for key, value in line.items() if key.startswith("grad_norm_")}
        for line in finished(*six).lines("train")
    }
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        seconds = {phase: line[f"{phase}_seconds"] for phase in PHASES}
        assert all(seconds[phase] > 0 for phase in STEP_PHASES)
        assert line["images_per_second"] == pytest.approx(16 / sum(seconds.values()), rel=1e-6)
        assert line["tokens_per_second"] > 16 * line["images_per_second"]  # 16 patches and a caption
        assert line["mfu"] is None
        assert 0.05 < line["peak_gib"] < 100
        assert 0 <= line["data_stalls"] <= 3
        assert line["skipped_steps"] == 0
        roles = {key: value for key, value in line.items() if key.startswith("grad_norm_")}
        assert roles.keys() == {f"grad_norm_{role}" for role in ("input", "hidden", "output", "vector")}
        assert math.hypot(*roles.values()) == pytest.approx(line["grad_norm"], rel=1e-5)
        assert roles == pytest.approx(expected[line["step"]], rel=1e-3)
    assert lines[0]["checkpoint_seconds"] == 0 < lines[1]["checkpoint_seconds"]  # after the third step's line


def test_peak_memory_is_that_of_the_process_since_the_reset() -> None:
    peak_memory.reset_peak(CPU)
    before = peak_memory.peak_bytes(CPU)
    assert before == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_memory.peak_bytes(CPU) >= before + 60 * 2**20
    del block
    peak_memory.reset_peak(CPU)
    assert peak_memory.peak_bytes(CPU) < before + 30 * 2**20


def test_the_start_up_block(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("engine.kind=fsdp", "engine.num_ranks=4", "engine.num_replicas=2")
    specs = build_table(recipe)
    text = banner(plan(recipe)[0], specs, 160, Topology(Axis(0, 2), Axis(0, 2)))
    assert "engine fsdp on 4 rank(s) as 2 replicas x 2 shards, 1 micro-batch(es) of 4 on each" in text
    assert "fp32 matrix products" in text
    assert "peak unknown: MFU n/a" in text
    assert "scaled_dot_product_attention" in text
    assert "kernels of ours: gelu_tanh, joint_qkv" in text
    assert f"{sum(math.prod(spec.shape) for spec in specs):,} parameters (hidden " in text
    assert "GFLOP per image" in text
