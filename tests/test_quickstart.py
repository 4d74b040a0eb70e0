"""The README's first command, whole: slow, because it really trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_learns(tmp_path: Path):
    """Validation loss falls clearly below the best constant prediction; what is printed is there."""
    command = [sys.executable, "-P", "-m", "megadit", "quickstart", "--run", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    assert last["weights"].startswith("ema_")
    assert last["loss"] < 0.35 * last["constant_loss"], last
    for name in ("samples.png", "loss.png"):
        assert f"run/{name}" in result.stdout
        assert min(Image.open(tmp_path / "run" / name).size) > 200
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)  # nothing left to train
    assert again.returncode == 0, again.stdout + again.stderr
