"""`megadit bench` on a real recipe: the table, several settings, several ranks, bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megadit.benchmarks import synthetic
from megadit.benchmarks.synthetic import Setting
from megadit.benchmarks.train_speed import parse_settings
from megadit.cli import app
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe

WITHOUT_DATA = "data.url=/absent"


def test_a_table_of_micro_batches_and_levels(tiny_yaml: Path, tmp_path: Path) -> None:
    arguments = ["--micro-batch", "2,8", "--activation-checkpointing", "none,2", "--steps", "2"]
    file = tmp_path / "train.json"
    result = CliRunner().invoke(app, ["bench", "train", str(tiny_yaml), WITHOUT_DATA, *arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    (table,) = json.loads(file.read_text())
    assert table["title"].startswith(
        "tiny: mmdit of width 64 and depth 2, fp32, engine single on 1 rank(s), blocks not"
    )
    rows = table["rows"]
    assert [(row["micro-batch"], row["checkpointing"], row["MFU"]) for row in rows] == [
        (2, "none", None), (8, "none", None), (2, "2", None), (8, "2", None),
    ]  # fmt: skip
    for row in rows:
        assert row["images/s"] == pytest.approx(row["micro-batch"] / row["ms/step"] * 1000, rel=0.1)
        assert row["tokens/s"] == pytest.approx(row["images/s"] * (16 + 77), rel=0.1)
        assert row["ratio"] == pytest.approx(row["images/s"] / rows[0]["images/s"])
        assert sum(row[phase] for phase in ("forward", "backward", "optimizer")) == pytest.approx(1, abs=0.02)


def test_ranks_measure_together(run_ranks: Callable, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("engine.kind=fsdp", "engine.num_ranks=2", WITHOUT_DATA)
    first, second = run_ranks("bench.py", 2, recipe=recipe, settings=[Setting(4, "none")])
    assert first == second
    (costs,) = first
    assert costs.num_steps == 2
    assert costs.images_per_second == pytest.approx(2 * 4 / sum(costs.seconds.values()))
    assert costs.seconds["data"] == 0


@pytest.mark.parametrize("name", ["dit-mup-search-cpu", "pixart-mup-proxy-cpu", "mmdit-mup-proxy-cpu"])
def test_every_family_trains_on_synthetic_data(name: str, twin: Callable[..., Recipe]) -> None:
    recipe = twin(name, "engine.kind=single", "engine.num_ranks=1", "model.width=64", WITHOUT_DATA)
    (measured,) = synthetic.bench(recipe, [Setting(2, "none")], num_steps=1, text_tokens=None)
    assert measured.costs is not None and measured.costs.flops_per_second > 0


def test_synthetic_captions_have_the_asked_length(tiny_recipe: Callable[..., Recipe]) -> None:
    batch = synthetic_batch(tiny_recipe(), 3, 11, torch.device("cpu"))
    assert batch.text.shape == (3, 11, 384)
    assert batch.text_lengths.tolist() == [11] * 3
    assert bool((batch.drop_uniform == 1).all())


def test_what_the_recipe_says_is_the_default(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("engine.activation_checkpointing=full")
    assert parse_settings(recipe, None, None, 2) == [Setting(8, "full")]
    assert parse_settings(recipe, "1,2", "none,3", 1) == [
        Setting(1, "none"), Setting(2, "none"), Setting(1, 3), Setting(2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("asked", ["8,", "0", "-1", "many"])
def test_what_is_no_micro_batch_is_refused(asked: str, tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="--micro-batch takes whole numbers with commas between, such as 8,16, not '"):
        parse_settings(tiny_recipe(), asked, None, 1)


def test_an_unknown_level_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    with pytest.raises(ValueError, match="activation_checkpointing"):
        synthetic.bench(recipe, parse_settings(recipe, "2", "half", 1), num_steps=1, text_tokens=None)
