"""Each command of `megadit bench`, shrunk: a table of ratios on the screen, the same figures as JSON."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megadit.benchmarks.findings import Table
from megadit.benchmarks.kernel_speed import saved_bytes
from megadit.cli import app
from megadit.kernels.gelu import gelu_tanh

SMALL = ["model.width=64"]
COMMANDS = {
    "train": ["train", "quickstart", *SMALL, "engine.kind=single", "engine.num_ranks=1", "--steps=1"],
    "sharding": ["train", "quickstart", *SMALL, "--sharding", "--micro-batch", "2", "--pairs", "1"],
    "checkpoint": ["checkpoint", "quickstart", *SMALL, "--rounds", "1"],
    "memory": ["memory", "quickstart", *SMALL, "training.batch_size=8", "--engines", "fsdp", "--ranks", "1"],
    "peers": ["peers", "quickstart", *SMALL, "--batch", "2", "--pairs", "1"],
    "kernels": ["kernels", "--width", "64", "--head-dim", "16", "--tokens", "16", "--pairs", "1"],
}


def run(*arguments: str, json_file: Path) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["bench", *arguments, "--json", str(json_file)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    tables: list[dict[str, Any]] = json.loads(json_file.read_text())
    for table in tables:
        assert table["title"] in result.stdout
        assert f"ratio: {table['baseline']}" in result.stdout
        assert table["beside"].keys() == {"date", "device", "cores", "threads", "torch", "load"}
        assert all(row["ratio"] > 0 for row in table["rows"])
    return tables


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path)] if name == "checkpoint" else []
    (table,) = run(*COMMANDS[name], *folder, json_file=tmp_path / "found.json")
    assert table["rows"]


def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit.benchmarks import eval_speed

    networks = {name: made for name, made in eval_speed._networks().items() if name == "EfficientNet-lite0"}
    monkeypatch.setattr(eval_speed, "_networks", lambda: networks)
    tables = run("eval", "--vectors=32", "--reference=16", "--batch=1", "--pairs=1", json_file=tmp_path / "eval.json")
    assert len(tables) == 3
    for scores in tables[1:]:
        assert sum(row["ratio"] for row in scores["rows"]) == pytest.approx(1)


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadit.benchmarks import data_speed

    for name, small in {
        "PICTURE_PASSES": 1, "LATENT_PASSES": 1, "INDEX_PASSES": 1, "SHORT_SIDE": 300, "NUM_CAPTIONS": 640,
    }.items():  # fmt: skip
        monkeypatch.setattr(data_speed, name, small)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # it gets the address of a server
    monkeypatch.setattr(data_speed, "order_rows", list)  # of 11 million samples; a slow test runs it
    (table,) = run("data", "--samples=96", "--rounds=1", json_file=tmp_path / "data.json")
    assert {row["what, beside"].partition(",")[0] for row in table["rows"]} >= {
        "undecoded samples/s",
        "decoded to 256 px",
    }


def test_the_old_spelling_names_the_new_one() -> None:
    error = CliRunner().invoke(app, ["bench", "quickstart", "--steps", "1"]).exception
    assert str(error).startswith("megadit bench quickstart: say what to measure, train, data, checkpoint")
    assert str(error).endswith("`megadit bench train quickstart`")


def test_the_table_is_aligned() -> None:
    rows = [{"what": "a", "s": 12.345, "n": 3}, {"what": "long name", "s": None, "n": 12345}]
    table = Table("title", "dd", rows, beside={"cores": 2})
    assert str(table).splitlines() == [
        "title",
        "ratio: dd",
        "what          s      n",
        "a          12.3      3",
        "long name   n/a  12345",
        "cores 2",
    ]


def test_saved_bytes_are_those_that_autograd_keeps() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(lambda x: x.exp(), [x]) == 4 * 8 * 4  # its output
    assert saved_bytes(lambda x: x + 1, [x]) == 0
    assert saved_bytes(gelu_tanh, [x]) == 2 * 4 * 8 * 4  # its input and the sigmoid
