"""From studies to a report, a figure and a target recipe with its provenance; what is no transfer is refused."""

import csv
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from megadit import recipe as recipes
from megadit.parametrization import base_shapes
from megadit.planning.flops import training_flops
from megadit.recipe import load
from megadit.tuning.curve import Curve, Divergence
from megadit.tuning.optimum import read_curves
from megadit.tuning.space import grid, parse_space
from megadit.tuning.study import Study, open_or_create
from megadit.tuning.transfer import transfer

DATA = {"url": "file:///data", "fingerprint": "f" * 64, "max_text_tokens": 77}
Loss = Callable[[int, float, int], float]


def parabola(width: int, log2_lr: float, seed: int) -> float:
    """Lowest at 2^-6.7, lower for the wider; no value above 2^-5.5, where it diverges."""
    return math.nan if log2_lr > -5.5 else 20 / width + 0.1 * (log2_lr + 6.7) ** 2 + 0.01 * seed


@pytest.fixture(scope="module")
def make_study(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A study whose values are a function instead of those of runs; nan is a trial that diverged, inf one to come."""

    def make(
        loss: Loss = parabola,
        space: Sequence[str] = ("model.width=32,64,128", "optimizer.lr=2^-9..2^-5", "seed=0,1"),
        overrides: Sequence[str] = (),
        name: str = "study",
        metric: str = "training/velocity",
    ) -> Path:
        folder = tmp_path_factory.mktemp("studies") / name
        study = open_or_create(folder, load(tiny_yaml, overrides), metric, DATA)
        for trial in study.add(grid(parse_space(space)), {"space": list(space)}):
            value = loss(trial.recipe.model.width, math.log2(trial.recipe.optimizer.lr), trial.recipe.seed)
            if value == math.inf:
                continue
            claim = study.claim(trial)
            assert claim is not None
            if math.isnan(value):
                claim.prune(Divergence(7, "the loss is inf"))
            else:
                claim.finish(value)
            claim.release()
        return folder

    return make


@pytest.fixture(scope="module")
def study(make_study: Callable[..., Path]) -> Path:
    """One whose optimum is plain to see."""
    return make_study()


@pytest.fixture
def target(tiny_yaml: Path, tmp_path: Path) -> Path:
    """A wider model, trained for longer."""
    path = tmp_path / "target.yaml"
    path.write_text(f"extends: {tiny_yaml}\nname: big\nmodel: {{width: 256}}\ntraining: {{num_images: 64000}}\n")
    return path


def provenance(path: Path) -> Mapping[str, Any]:
    found = load(path).provenance
    assert found is not None
    return found


def test_curves_by_width(study: Path) -> None:
    curves = read_curves(Study(study))
    assert [curve.width for curve in curves] == [32, 64, 128]
    for curve in curves:
        assert curve.log2_lr_L.tolist() == [-9, -8, -7, -6]
        assert curve.diverged == (-5,)
        expected = [[parabola(curve.width, lr, seed) for lr in (-9, -8, -7, -6)] for seed in (0, 1)]
        np.testing.assert_allclose(curve.loss_SL, expected)


def test_a_learning_rate_counts_when_all_seeds_are_done(make_study: Callable[..., Path]) -> None:
    def partly(width: int, log2_lr: float, seed: int) -> float:
        return math.inf if (log2_lr, seed) == (-7, 1) else parabola(width, log2_lr, seed)

    (curve,) = read_curves(Study(make_study(partly, ["model.width=32", "optimizer.lr=2^-9..2^-5", "seed=0,1"])))
    assert curve.log2_lr_L.tolist() == [-9, -8, -6]


def test_each_width_shows_its_best_setting(make_study: Callable[..., Path], tiny_yaml: Path, tmp_path: Path) -> None:
    space = ["model.width=32", "optimizer.lr=2^-8..2^-6", "optimizer.max_grad_norm=0.1,1.0"]
    study = open_or_create(tmp_path / "clip", load(tiny_yaml), "training/velocity", DATA)
    for trial in study.add(grid(parse_space(space)), {}):
        claim = study.claim(trial)
        assert claim is not None
        clip = trial.recipe.optimizer.max_grad_norm
        assert clip is not None
        claim.finish(parabola(32, math.log2(trial.recipe.optimizer.lr), 0) - 0.1 * (clip < 1))
    (curve,) = read_curves(Study(tmp_path / "clip"))
    assert curve.settings == {"optimizer.max_grad_norm": 0.1}
    transfer([tmp_path / "clip"], str(tiny_yaml), tmp_path / "out.yaml")
    assert load(tmp_path / "out.yaml").optimizer.max_grad_norm == 0.1


def test_the_report(study: Path, make_study: Callable[..., Path]) -> None:
    def moving(width: int, log2_lr: float, seed: int) -> float:  # an octave for each doubling, and wider is worse
        return 0.001 * width + 0.1 * (log2_lr + 6 + math.log2(width / 32)) ** 2

    space = ["model.width=32,64,128", "optimizer.lr=2^-9..2^-5"]
    sp = make_study(moving, space, overrides=["parametrization.kind=sp"], name="sp")
    assert transfer([study, sp]).splitlines() == [
        "study (mup): trials 24 finished, 6 pruned, 0 unfinished; training/velocity, mean of 2 seed(s)",
        " width   best lr  minimum at log2 lr     loss  note",
        "    32      2^-7       -6.70 +- 0.00   0.6390",
        "    64      2^-7       -6.70 +- 0.00   0.3265",
        "   128      2^-7       -6.70 +- 0.00   0.1702",
        "over widths 32 to 128 the best rate moves by 0 octave(s) on the grid, by 0.00 between the fitted minima",
        "at 2^-7, the best of width 32, wider is better: 0.6390, 0.3265, 0.1702",
        "",
        "sp (sp): trials 15 finished, 0 pruned, 0 unfinished; training/velocity, mean of 1 seed(s)",
        " width   best lr  minimum at log2 lr     loss  note",
        "    32      2^-6               -6.00   0.0320",
        "    64      2^-7               -7.00   0.0640",
        "   128      2^-8               -8.00   0.1280",
        "over widths 32 to 128 the best rate moves by 2 octave(s) on the grid, by 2.00 between the fitted minima",
        "at 2^-6, the best of width 32, wider is not always better: 0.0320, 0.1640, 0.5280",
    ]


def test_the_table_has_every_trial(study: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "trials.csv"
    transfer([study, study], table_path=path)
    rows = list(csv.DictReader(path.open()))
    trials = [trial for trial in Study(study).trials() if trial.done]
    assert len(rows) == 2 * len(trials)
    for row, trial in zip(rows, [*trials, *trials], strict=True):
        assert {f"{key}={row[key]}" for key in ("model.width", "optimizer.lr")} <= set(trial.overrides)
        assert (row["training/velocity"] == "") == (trial.value is None)
        assert trial.value is None or float(row["training/velocity"]) == pytest.approx(trial.value, rel=1e-5)


def test_the_figure(study: Path, tmp_path: Path) -> None:
    transfer([study], figure_path=tmp_path / "one" / "figure.png")
    transfer([study, study], figure_path=tmp_path / "two.png")
    with Image.open(tmp_path / "one" / "figure.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.format == two.format == "PNG"
        assert two.width > 1.5 * one.width
        assert len({colour for _, colour in one.convert("RGB").getcolors(1 << 24)}) > 100


def test_values_below_zero_are_drawn(make_study: Callable[..., Path], study: Path, tmp_path: Path) -> None:
    aligned = make_study(lambda *at: parabola(*at) - 2, metric="validation/alignment")
    transfer([aligned], figure_path=tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert len({colour for _, colour in figure.convert("RGB").getcolors(1 << 24)}) > 100
    with pytest.raises(ValueError, match="which do not compare: training/velocity, validation/alignment"):
        transfer([study, aligned])


def test_the_target_is_the_recipe_with_what_was_found(study: Path, target: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "tuned.yaml"
    report = transfer([study], str(target), out)
    before, after = load(target), load(out)
    changed = recipes.differences(before, after)
    assert {key for key in changed if not key.startswith("provenance")} == {"optimizer.lr"}
    assert after.optimizer.lr == 2**-6.7
    assert yaml.safe_load(out.read_text())["optimizer"]["lr"] == "2^-6.7"
    assert "optimizer.lr=2^-6.7" in report
    assert "model.width is 128 in the study and 256 in the target" in report

    facts = provenance(out)
    assert facts["extends"] == str(target)
    assert facts["trials"] == {"finished": 24, "pruned": 6, "unfinished": 0}
    assert facts["best_trial"]["name"] == "width=128,lr=2^-7,seed=0"
    assert (facts["metric"], facts["width"], facts["best_log2_lr"]) == ("training/velocity", 128, -7)
    assert facts["fitted_log2_lr"] == pytest.approx(-6.7)
    assert facts["uncertainty_log2_lr"] == pytest.approx(0, abs=1e-9)
    assert facts["data_fingerprint"] == DATA["fingerprint"]


def test_base_shapes_are_identified_by_their_file(study: Path, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.bsh"
    base_shapes.make(load(target), path)
    transfer([study], str(target), tmp_path / "by_width.yaml")
    # The same base shapes by file: no difference.
    target.write_text(target.read_text() + f"parametrization: {{base_width: null, base_shapes: {path}}}\n")
    transfer([study], str(target), tmp_path / "by_file.yaml")
    by_width, by_file = (provenance(tmp_path / f"{name}.yaml")["base_shapes"] for name in ("by_width", "by_file"))
    assert (by_width["width"], by_width["file"]) == (32, None)
    assert (by_file["width"], by_file["file"]) == (None, str(path))
    assert by_width["sha256"] == by_file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_cost_is_that_of_all_steps_of_all_trials(swept: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    transfer([swept], str(tiny_yaml), tmp_path / "out.yaml")
    spent = 0
    for trial in Study(swept).trials():
        flops = training_flops(trial.recipe.model, [120])  # the longest caption that MiniLM's data may have
        spent += len(Curve.read(trial.run).losses) * 16 * flops
    found = provenance(tmp_path / "out.yaml")
    assert found["cost_fraction"] == pytest.approx(spent / (320 * training_flops(load(tiny_yaml).model, [120])))
    assert found["git_revisions"]


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("model: {depth: 3}", ["model.depth"]),
        ("model: {head_dim: 32}", ["model.head_dim"]),
        ("model: {patch_size: 2}", ["model.patch_size"]),
        ("objective: {logit_mean: 1.0}", ["objective.logit_mean"]),
        ("parametrization: {output_mult: 2}", ["parametrization.output_mult"]),
        ("parametrization: {adaln_init: paper}", ["parametrization.adaln_init"]),
        ("parametrization: {decay_exponent: 1}", ["parametrization.decay_exponent"]),
        ("parametrization: {base_width: 64}", ["parametrization.base_width"]),
        ("parametrization: {kind: sp}", ["parametrization.kind"]),
        ("optimizer: {betas: [0.9, 0.9], eps: 1}", ["optimizer.betas", "optimizer.eps"]),
        ("optimizer: {schedule: constant}", ["optimizer.schedule"]),
    ],
)
def test_what_is_no_transfer_is_refused_unless_allowed(
    study: Path, target: Path, tmp_path: Path, override: str, keys: list[str]
) -> None:
    extended = tmp_path / "extended.yaml"
    extended.write_text(f"extends: {target}\n{override}\n")
    out = tmp_path / "out.yaml"
    for allowed in range(len(keys)):
        named = ".*".join(re.escape(key) for key in keys[allowed:])
        with pytest.raises(ValueError, match=f"no transfer: {named}"):
            transfer([study], str(extended), out, allow=keys[:allowed])
    assert not out.exists()
    transfer([study], str(extended), out, allow=keys)
    assert all(any(said.startswith(key) for said in provenance(out)["differences"]) for key in keys)


def test_a_study_under_sp_does_not_transfer(make_study: Callable[..., Path], target: Path, tmp_path: Path) -> None:
    target.write_text(target.read_text() + "parametrization: {kind: sp}\n")
    study = make_study(space=["optimizer.lr=2^-8..2^-6"], overrides=["parametrization.kind=sp"])
    with pytest.raises(ValueError, match="no transfer: parametrization.kind is sp in the study"):
        transfer([study], str(target), tmp_path / "out.yaml")


def test_an_optimum_at_the_end_of_the_grid_is_no_claim(
    make_study: Callable[..., Path], target: Path, tmp_path: Path
) -> None:
    study, out = make_study(space=["model.width=32", "optimizer.lr=2^-10..2^-8"]), tmp_path / "out.yaml"
    assert "at the end of the rates tried" in transfer([study])
    with pytest.raises(ValueError, match="the best, 2.-8, is at the end of those tried"):
        transfer([study], str(target), out)
    transfer([study], str(target), out, allow=["optimizer.lr"])
    assert load(out).optimizer.lr == 2**-8
    assert provenance(out)["fitted_log2_lr"] is None


def test_without_finished_trials(make_study: Callable[..., Path], tmp_path: Path) -> None:
    study = make_study(lambda width, lr, seed: math.nan if seed else math.inf, ["seed=0,1,2"])
    with pytest.raises(ValueError, match="has no finished trial: 2 pruned, 1 unfinished"):
        transfer([study])
    with pytest.raises(ValueError, match="is not a study: it has no study.yaml"):
        transfer([tmp_path])


def test_only_widths_are_compared(make_study: Callable[..., Path]) -> None:
    study = make_study(space=["model.depth=1,2", "optimizer.lr=2^-8,2^-7"])
    with pytest.raises(ValueError, match="varies model.depth; only widths are compared"):
        transfer([study])


def test_a_target_needs_a_file(study: Path, target: Path) -> None:
    with pytest.raises(ValueError, match=r"--to.* and .*--out.* go together"):
        transfer([study], str(target))
