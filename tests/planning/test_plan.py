"""The planner: against published figures, its own inverse, and what a user can get wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megadit.cli import app
from megadit.planning.collectives import Collective
from megadit.planning.costs.published_runs import comparisons, median_error
from megadit.planning.costs.roof import attention_share
from megadit.planning.costs.run_cost import saving
from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.machine.gpus import GPUS
from megadit.planning.machine.network import Network
from megadit.planning.run_plan import GIB, machine_of, plan
from megadit.recipe import differences, load
from megadit.recipe.schema import Hardware

H100 = GPUS["h100"]
SMALL = ("model.width=256", "model.depth=2", "parametrization.base_shapes=null", "parametrization.base_width=128")
SMALL += ("model.repa.block=1",)


def test_one_calibration_holds_for_all_published_runs() -> None:
    assumed = Assumptions()
    found = comparisons(assumed)
    assert len(found) >= 7
    assert median_error(assumed) <= 0.2
    assert median_error(assumed, left_out=True) <= 0.2
    assert sum(not each.in_range for each in found) <= 1


@pytest.mark.parametrize(
    ("head_dim", "length", "tflops"),
    [
        *((64, 512, 287), (64, 1024, 371), (64, 2048, 432), (64, 4096, 457)),
        *((128, 512, 348), (128, 1024, 456), (128, 2048, 531), (128, 4096, 567)),
    ],
)
def test_attention_is_as_fast_as_flash_attention_3(head_dim: int, length: int, tflops: float) -> None:
    """Forward and backward on an H100, arXiv 2407.08608, figures 5 and 6."""
    ours = attention_share(head_dim, length) * H100.tflops["bf16"] * H100.sustained_share
    assert ours == pytest.approx(tflops, rel=0.05)


def test_a_gather_over_256_gpus_takes_what_nccl_takes() -> None:
    """2 GB at 200 GB/s, nccl issue 1218."""
    network = Network(H100, 256, 8, 1, Assumptions())
    seconds = network.seconds(Collective("all_gather", "shard", 1, 2 * 10**9))
    assert 2 / seconds == pytest.approx(200, rel=0.05)


def test_wires_of_axes() -> None:
    """Inside a node NVLink; a replica of several nodes all of their NICs; over replicas one NIC for each GPU."""
    assumed = Assumptions(nic_share=1.0, link_share=1.0)
    node, flat, hybrid, mixed = (
        Network(H100, gpus, 8, replicas, assumed) for gpus, replicas in ((8, 1), (64, 1), (64, 8), (64, 16))
    )
    assert node.gb_per_second("shard") == hybrid.gb_per_second("shard") == H100.link_gb_per_second
    assert flat.gb_per_second("shard") == 8 * H100.nic_gb_per_second
    assert hybrid.gb_per_second("replicate") == H100.nic_gb_per_second
    assert mixed.gb_per_second("replicate") == 2 * H100.nic_gb_per_second
    reduced = Collective("all_reduce", "shard", 2, 10**9)
    assert flat.seconds(reduced) == 2 * flat.seconds(Collective("all_gather", "shard", 2, 10**9))


def test_the_best_interval_loses_least() -> None:
    recipe = load("mmdit-18b", ["hardware=null"])
    assumed = Assumptions(storage_gb_per_second=1e6)  # or writing, and not Young's formula, decides

    def goodput(images: float) -> float:
        checkpoints = recipe.checkpoints.model_copy(update={"every_images": images})
        return saving(recipe.model_copy(update={"checkpoints": checkpoints}), 18 * 10**9, 1024, 5000.0, assumed).goodput

    best = 5000 * saving(recipe, 18 * 10**9, 1024, 5000.0, assumed).best_interval_seconds
    assert goodput(best) > max(goodput(0.8 * best), goodput(1.25 * best))


def test_what_is_computed_again_takes_longer_and_less_memory() -> None:
    recipe = load("dit-xl2-mup")
    machine = machine_of(recipe, None, None, None)
    none, full = (
        plan(load("dit-xl2-mup", [f"engine.activation_checkpointing={level}"]), machine, Assumptions())
        for level in ("none", "full")
    )
    assert full.time.compute == pytest.approx(4 / 3 * none.time.compute, rel=0.1)
    assert full.memory.peak < none.memory.peak / 2
    assert full.flops_per_image == none.flops_per_image  # the model's, whatever is computed again
    assert full.mfu() < none.mfu()


def test_18b_on_1024_gpus_is_planned_without_its_memory(tmp_path: Path) -> None:
    """The states are 20 bytes a parameter over 32 shards."""
    words = ["plan", "mmdit-18b", "--gpu", "h100", "--nodes", "128", "engine.num_replicas=32", "--json"]
    words += ["data.num_streams=1024", "training.micro_batch_size=4"]
    script = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9,) * 2); import os, sys; "
    script += f"os.execv(sys.executable, [sys.executable, '-P', '-m', 'megadit', *{words!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sizes = found["memory"]["device_bytes"]
    states = sizes["weights"] + sizes["optimizer state"] + sizes["averages"]
    assert states == pytest.approx(16 * 17.8e9 / 32, rel=0.01)
    assert found["memory"]["needed_gib"] < 80


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text proxy, small, with a micro-batch that no GPU holds."""
    path = tmp_path_factory.mktemp("recipes") / "large.yaml"
    path.write_text(
        "extends: pixart-mup\nname: large\nmodel: {depth: 4}\n"
        "parametrization: {base_shapes: null, base_width: 288}\n"
        "training: {batch_size: 45056, num_images: 45056000, micro_batch_size: null}\nengine: {num_ranks: 4}\n"
        "hardware: {gpu: h100, num_nodes: 1, gpus_per_node: 4}\n"
    )
    return path


def test_what_does_not_fit_is_said_and_mended(proxy: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    said = CliRunner().invoke(app, ["plan", str(proxy), "--out", str(out)])
    assert said.exit_code == 1, said.output
    assert (
        "does not fit: " in said.output and "the nearest settings that fit: training.micro_batch_size=" in said.output
    )
    mended, asked = load(out), load(proxy)
    assert differences(asked, mended).keys() == {"training.micro_batch_size"}
    again = CliRunner().invoke(app, ["plan", str(out), "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["problems"] == []


def test_another_machine_is_written_with_the_recipe(proxy: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    said = CliRunner().invoke(app, ["plan", str(proxy), "--gpu", "b200", "--fastest", "--out", str(out)])
    assert said.exit_code == 1, said.output
    assert load(out).hardware == Hardware(gpu="b200", num_nodes=1, gpus_per_node=8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "GPU 'h1000' is not in the table; there are a100-40, a100, h100"),
        (["--assume", "luck=1"], "there is no assumption 'luck'; there are compute_share"),
        (["--assume", "overlap=much"], "'much' is not a number"),
        (["--assume", "overlap=-1"], "must not be below 0"),
        (["--nodes", "3"], "batch_size 256 is no multiple of 24 ranks"),
        (["--nodes", "32"], "256 ranks do not divide data.num_streams 128"),
        (["--nodes", "2", "engine.num_replicas=3"], "engine.num_replicas 3 must divide the GPUs of hardware: 16"),
        (["training.micro_batch_size=64"], "training.micro_batch_size 64 must divide the 32 samples"),
        (["engine.kind=single", "engine.num_ranks=1"], "engine.kind single runs on one GPU, not 8"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], message: str) -> None:
    said = CliRunner().invoke(app, ["plan", "dit-mup-144", *words])
    assert said.exit_code == 1
    assert message in str(said.exception)


def test_a_recipe_without_a_machine_asks_for_one() -> None:
    said = CliRunner().invoke(app, ["plan", "quickstart"])
    assert "the recipe names no hardware: give --gpu" in str(said.exception)


def test_the_reserve_and_the_memory_make_up_what_is_needed() -> None:
    recipe = load("dit-s2-sp")
    planned = plan(recipe, machine_of(recipe, "a100-40", None, None), Assumptions(reserved_gib=1, usable_share=0.9))
    assert planned.needed_gib == pytest.approx(planned.memory.peak / GIB + 1 + 0.1 * 39.4)
