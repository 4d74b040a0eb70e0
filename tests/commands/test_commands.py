"""Every command that a recipe's comments or the help show runs, shrunk as shrunk.yaml says."""

import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
EXAMPLES = runpy.run_path(str(HERE.parent / "test_documented_commands.py"))["EXAMPLES"]
TABLE = runpy.run_path(str(HERE / "conftest.py"))["read_table"]()
SHOWN = {
    shlex.join(each.arguments): each for each in EXAMPLES if each.where.endswith(".yaml") or "help of" in each.where
}


def cases() -> list[Any]:
    return [pytest.param(command, marks=[pytest.mark.slow] if TABLE[command].slow else []) for command in TABLE]


def test_every_example_is_in_the_table() -> None:
    unfinished = set(yaml.safe_load((HERE / "shrunk.yaml").read_text())["unfinished"])
    assert not unfinished & TABLE.keys() and unfinished <= SHOWN.keys()
    left = SHOWN.keys() - TABLE.keys() - unfinished
    missing = [f"{SHOWN[command].where}: {command}" for command in sorted(left)]
    assert not missing, "say in tests/commands/shrunk.yaml how these are shrunk:\n" + "\n".join(missing)
    written = {shlex.join(each.arguments) for each in EXAMPLES}
    assert TABLE.keys() <= written, "nothing shows these"


@pytest.mark.parametrize("command", cases())
def test_an_example_runs(command: str, sandbox: Any) -> None:
    shrunk = TABLE[command]
    ended = sandbox.example(command)
    assert ended.exit_code == shrunk.exit_code, (
        f"megadit {shlex.join(shrunk.words(shlex.split(command)))}\n{ended.said}"
    )
    assert shrunk.says in ended.said and bool(shrunk.says) == bool(shrunk.exit_code), ended.said
    for path in shrunk.writes:
        assert (sandbox.folder / path).exists(), f"{command} does not write {path}"
