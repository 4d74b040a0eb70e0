"""How a single process ends: which errors are one line, which keep their traceback, which exit code comes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(body: str, tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    script = (
        f"import sys\nfrom megadit.launcher.failures import run_reporting\ndef work():\n    {body}\nrun_reporting(work)"
    )
    unset = {"RANK", "MEGADIT_FAILURES", "MEGADIT_TRACEBACK"}
    env = {k: v for k, v in os.environ.items() if k not in unset} | environ
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("pass", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('gone')", 1, "gone\n"),
        ("raise ValueError('no\\n such thing')", 1, "megadit: error: no such thing\n"),
        ("open('absent')", 1, "megadit: error: [Errno 2] No such file or directory: 'absent'\n"),
    ],
)
def test_expected_ends(body: str, code: int, err: str, tmp_path: Path):
    result = run(body, tmp_path)
    assert (result.returncode, result.stderr) == (code, err)


def test_unexpected_errors_keep_their_traceback(tmp_path: Path):
    result = run("assert 1 == 2, 'ours'", tmp_path)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("megadit: error: AssertionError: ours (its traceback is above)\n")


def test_traceback_on_request(tmp_path: Path):
    result = run("raise ValueError('x')", tmp_path, MEGADIT_TRACEBACK="1")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("megadit: error: x\n")


def test_a_rank_of_another_launcher_says_which_it_is(tmp_path: Path):
    assert run("raise ValueError('x')", tmp_path, RANK="3").stderr == "megadit: error: rank 3: x\n"


def test_a_rank_whose_message_cannot_be_stored_prints_it(tmp_path: Path):
    result = run("raise ValueError('x')", tmp_path, RANK="3", MEGADIT_FAILURES=str(tmp_path / "absent"))
    assert result.stderr.startswith("megadit: error: rank 3: x ([Errno 2]")
