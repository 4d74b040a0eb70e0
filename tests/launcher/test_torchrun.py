"""torchrun starts the ranks again when one dies, and the run goes on with its newest checkpoint."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megadit.recipe import load
from megadit.training import trainer

SECONDS = 200
RANKS = ("engine.kind=fsdp", "checkpoints.every_images=48")


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}


def kill_a_rank(process: psutil.Popen, run: Path, num_checkpoints: int) -> None:
    """SIGKILL to rank 1 when there are so many checkpoints."""
    deadline = time.monotonic() + SECONDS
    while len(list(run.glob("checkpoints/images-*"))) < num_checkpoints:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "it does not start"
        time.sleep(0.002)
    (rank,) = [child for child in process.children() if child.environ().get("RANK") == "1"]
    rank.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of processes")
def test_a_restart_goes_on(tiny_yaml: Path, tmp_path: Path) -> None:
    """With --resume never, too, which speaks of the first start only."""
    run = tmp_path / "run"
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    ranks = ["-m", "--", "megadit", "train", str(tiny_yaml), *RANKS, "--run", str(run), "--resume", "never"]
    process = psutil.Popen(
        [*torchrun, "--standalone", *ranks], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        kill_a_rank(process, run, num_checkpoints=2)
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        for member in [*process.children(recursive=True), process] if process.is_running() else []:
            member.send_signal(signal.SIGKILL)
    assert process.returncode == 0, output
    assert "resumed from" in output
    assert len(json.loads((run / "environment.json").read_text())) == 2  # starts
    trainer.train(load(tiny_yaml), tmp_path / "uninterrupted")
    expected = curve(tmp_path / "uninterrupted")
    assert [*curve(run)] == [*expected] == [*range(1, 21)]
    for step, values in curve(run).items():
        assert values == pytest.approx(expected[step], rel=1e-4)
