"""The loss curve must show the numbers of metrics.jsonl, and say so when there are none."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megadit.eval import curves


def write_metrics(run: Path, scale: float = 1.0) -> None:
    run.mkdir(exist_ok=True)
    lines = []
    for step in range(1, 9):
        loss = scale / step
        bins = [None if step == 3 else loss, loss, 2 * loss]
        lines.append(
            {"kind": "train", "images": step * 64, "step": step, "loss": 3.0, "velocity": loss, "loss_bins": bins}
        )
        for weights in ("raw", "ema_0.99") if step % 4 == 0 else ():
            validation = {
                "metric": "velocity",
                "loss": 1.1 * loss,
                "loss_strata": [loss],
                "constant_loss": 1.3,
                "weights": weights,
            }
            lines.append({"kind": "validation", "images": step * 64, **validation, "total": 3.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_picture_depends_on_the_losses(tmp_path: Path):
    pictures = []
    for index, scale in enumerate((1.0, 1.0, 2.0)):
        write_metrics(tmp_path / "run", scale)
        out = curves.draw(tmp_path / "run", tmp_path / "out" / f"{index}.png")
        pictures.append(np.asarray(Image.open(out).convert("RGB")))
    assert pictures[0].shape[0] > 400
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_the_lines_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    plot = curves.Axes.plot

    def record(axes, x, y, **options):
        drawn[options["label"]] = (list(x), list(y))
        return plot(axes, x, y, **options)

    monkeypatch.setattr(curves.Axes, "plot", record)
    write_metrics(tmp_path / "run")
    curves.draw(tmp_path / "run", tmp_path / "curve.png")
    assert drawn["training, velocity"] == ([64 * n for n in range(1, 9)], [1 / n for n in range(1, 9)])
    assert drawn["validation, raw weights"] == ([256, 512], [1.1 * (1 / 4), 1.1 * (1 / 8)])
    assert drawn["timestep 0 to 0.333333"][0] == [64 * n for n in range(1, 9) if n != 3]  # the empty bin is left out
    assert drawn["timestep 0.666667 to 1"][1][0] == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no metrics.jsonl"), ("", "no line of training"), ('{"kind": "tra', "no line of training")],
)
def test_a_run_without_metrics(text: str | None, message: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        curves.draw(tmp_path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
