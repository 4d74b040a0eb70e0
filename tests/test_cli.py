"""The command line as a user meets it: help that costs nothing, one clear line for a mistake, exit codes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from megadit import cli
from megadit.recipe import load


def megadit(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MEGADIT_TRACEBACK"}
    env = {k: v for k, v in os.environ.items() if k not in unset} | environ
    command = [sys.executable, "-P", "-m", "megadit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


@pytest.mark.parametrize("command", ["", "train", "quickstart"])
def test_help(command: str, tmp_path: Path):
    result = megadit(*command.split(), "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: python -m megadit {command}".rstrip())


def test_every_command_has_help():
    commands = list(_commands(typer.main.get_command(cli.app), []))
    assert len(commands) > 20
    for path in commands:
        result = CliRunner().invoke(cli.app, [*path, "--help"], prog_name="megadit")
        assert result.exit_code == 0
        assert result.stdout.startswith(" ".join(["Usage: megadit", *path]))


def _commands(command: Any, path: list[str]) -> Iterator[list[str]]:
    """The names that lead to each command."""
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from _commands(each, [*path, name])


def test_help_names_exit_codes_and_variables(tmp_path: Path):
    text = megadit("--help", cwd=tmp_path).stdout
    for word in ("75 ", "130", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "MEGADIT_TRACEBACK"):
        assert word in text


def test_the_command_line_loads_no_heavy_package(tmp_path: Path):
    """A recipe needs torch, as its registries hold the models themselves, and nothing else of the kind."""
    heavy = "[name for name in ('torch', 'transformers', 'diffusers', 'boto3', 'deepspeed') if name in sys.modules]"
    script = f"import sys, megadit.cli\nprint({heavy})\nimport megadit.recipe\nprint({heavy})"
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "[]\n['torch']\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nope"], "no recipe 'nope'"),
        (["train", "quickstart", "model.widht=3"], "did you mean 'width'?"),
        (["train", "quickstart", "engine.num_ranks=three"], "engine.num_ranks = 'three'"),
        (["recipe", "show", "quickstart", "optimizer.lr"], "not of the form key.sub=value"),
        (["sample", "absent", "--prompt", "x", "--grid", "out.png"], "absent is not a run folder"),
        (["sample", "absent", "--grid", "out.png"], "give --prompt or --prompt-file"),
        (["sample", "absent", "--grid", "out.png", "--prompt-file", "absent.txt"], "absent.txt"),
        (["data", "pack", "absent", "packed"], "no source 'absent'"),
        (["data", "pack", "emoji", "packed", "--text", "absent"], "absent"),
        (["data", "pack", "emoji", "packed", "--where", "colour=red"], "colour"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path):
    result = megadit(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("megadit: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_broken_environment_is_one_line(tmp_path: Path):
    result = megadit("train", "quickstart", cwd=tmp_path, LOCAL_RANK="1")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "sets LOCAL_RANK but not RANK" in result.stderr


def test_usage_errors(tmp_path: Path):
    result = megadit("train", cwd=tmp_path)
    assert result.returncode == 2
    assert "Missing argument 'RECIPE'" in result.stderr
    assert megadit("sample", "run", "--grid", "x.png", "--steps", "0", cwd=tmp_path).returncode == 2


def test_recipe_show_prints_the_tree_and_the_table(tmp_path: Path):
    result = megadit("recipe", "show", "quickstart", "seed=7", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\nseed: 7\n" in result.stdout
    for word in ("hidden", "output", "input", "width"):
        assert word in result.stdout


def test_shapes_make(tmp_path: Path):
    width = ("parametrization.base_shapes=null", "parametrization.base_width=128")
    result = megadit("shapes", "make", "quickstart", "out.bsh", *width, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shipped = files("megadit.shapes") / load("quickstart").parametrization.base_shapes
    assert (tmp_path / "out.bsh").read_text() == shipped.read_text()


def test_pack_then_pack_again(tmp_path: Path):
    arguments = ["data", "pack", "emoji", "packed", "--size", "8", "--where", "subgroup=heart"]
    first = megadit(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "training and" in first.stdout
    files = {path: path.read_bytes() for path in (tmp_path / "packed").rglob("*") if path.is_file()}
    again = megadit(*arguments, cwd=tmp_path)
    assert again.returncode == 0
    assert "packed already" in again.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "packed").rglob("*") if path.is_file()} == files


def test_serve_prints_what_a_client_needs_and_stops(tmp_path: Path):
    import boto3

    command = [sys.executable, "-P", "-m", "megadit", "data", "serve", "objects", "--bucket", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(4)]
            variables = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
            client = boto3.client(
                "s3",
                endpoint_url=variables["AWS_ENDPOINT_URL"],
                aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
                region_name=variables["AWS_DEFAULT_REGION"],
            )
            assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["mine"]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    with pytest.raises(Exception, match="Could not connect"):
        client.list_buckets()
