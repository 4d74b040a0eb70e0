"""`megadit transfer`: what studies found, and the recipe of a larger model trained with it.

muP says that the best hyperparameters of a narrow model are those of a wide one, and of nothing else that differs. So
a target may differ from the study in width, in what was found to matter little in practice (batch size, length, data,
warm-up: arXiv 2505.15270), and in nothing else unless the user says so.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megadit import recipe as recipes
from megadit.files import write_text
from megadit.models import ModelConfig
from megadit.parametrization import base_shapes
from megadit.planning.flops import training_flops
from megadit.recipe import Recipe
from megadit.tuning import figure
from megadit.tuning.curve import Curve
from megadit.tuning.optimum import TUNED, LrCurve, Optimum, find_optimum, read_curves
from megadit.tuning.report import format_report, power, title, write_table
from megadit.tuning.study import Study, Trial, count_states, value_at

# Keys and sections in which a target may differ from the study, and of these what is worth saying.
_MAY_DIFFER = (
    "name", "seed", "provenance", "model.width", "data", "training", "optimizer.warmup_steps", "validation",
    "checkpoints", "engine",
)  # fmt: skip
_NOTED = ("model.width", "data.url", "training.num_images", "training.batch_size", "optimizer.warmup_steps")
_BASE_SHAPES = ("parametrization.base_shapes", "parametrization.base_width")  # compared by what they contain


def transfer(
    folders: Sequence[Path],
    target: str | None = None,
    out: Path | None = None,
    *,
    figure_path: Path | None = None,
    table_path: Path | None = None,
    allow: Sequence[str] = (),
) -> str:
    """Report on the studies in `folders`; write the recipe `target`, tuned as the first of them found best, to `out`.

    The report has for each study a table of widths with their best learning rates, and says whether these stay.
    `figure_path` gets one panel for each study, `table_path` one line for each trial. `allow` names keys in which the
    target may differ all the same.

    Raises ValueError for a folder without a study or without finished trials, for a target that differs from the study
    in something that does not transfer, and where the best learning rate is at the end of those tried (unless
    optimizer.lr is allowed).
    """
    if (target is None) != (out is None):
        raise ValueError("a target recipe (--to) and the file to write it to (--out) go together")
    studies = [Study(folder) for folder in folders]
    if len(metrics := dict.fromkeys(study.metric for study in studies)) > 1:
        raise ValueError(f"the studies have different metrics, which do not compare: {', '.join(metrics)}")
    curves = [read_curves(study) for study in studies]
    report = [format_report(study, found) for study, found in zip(studies, curves, strict=True)]
    if figure_path is not None:
        panels = [(title(study), found) for study, found in zip(studies, curves, strict=True)]
        figure.draw(panels, studies[0].metric, figure_path)
    if table_path is not None:
        write_table(studies, table_path)
    if target is not None and out is not None:
        report.append(_write_target(studies[0], curves[0][-1], target, out, allow))
    return "\n\n".join(report)


def _write_target(study: Study, curve: LrCurve, source: str, out: Path, allow: Sequence[str]) -> str:
    """Write the target with the best of the study's widest model; returns what it did, in words."""
    target = recipes.load(source)
    optimum, best = find_optimum(curve), _best_trial(curve)
    tuned = _tuned(study, optimum, best)
    noted = _check(best.recipe, target, tuned, optimum, allow)
    tree = recipes.load(source, [f"{key}={value}" for key, value in tuned.items()]).model_dump(mode="json")
    tree["optimizer"]["lr"] = tuned["optimizer.lr"]  # as a power
    tree["provenance"] = {
        "extends": source,
        "study": str(study.folder),
        **_findings(study, optimum, best),
        "tuned": tuned,
        "differences": noted,
        "base_shapes": _describe_base_shapes(target),
        "cost_fraction": _cost_fraction(study, target),
    }
    recipes.parse(tree, str(out))
    comment = f"# Written by `megadit transfer` from the recipe {source}.\n"
    write_text(out, comment + yaml.safe_dump(tree, sort_keys=False))
    lines = [f"{out}: {source} with {', '.join(f'{key}={value}' for key, value in tuned.items())}"]
    lines += [f"  not the same in study and target: {difference}" for difference in noted]
    lines.append(f"  the search cost {tree['provenance']['cost_fraction']:.2%} of the target's training FLOPs")
    return "\n".join(lines)


def _best_trial(curve: LrCurve) -> Trial:
    """The best trial at the curve's best learning rate."""
    best = curve.log2_lr_L[curve.mean_L.argmin()]
    finished = [(trial.value, trial.name, trial) for trial in curve.trials if trial.value is not None]
    return min(item for item in finished if math.log2(item[2].recipe.optimizer.lr) == best)[2]


def _tuned(study: Study, optimum: Optimum, best: Trial) -> dict[str, str]:
    """What the target takes over, as overrides: the learning rate, and every other hyperparameter searched."""
    searched = {override.partition("=")[0] for trial in study.trials() for override in trial.overrides}
    keys = {"optimizer.lr", *(key for key in searched if key.startswith(TUNED))}
    spelled = dict(override.split("=", 1) for override in best.overrides)
    tuned = {key: spelled.get(key) or json.dumps(value_at(best.recipe, key)) for key in sorted(keys)}
    return tuned if optimum.fitted is None else tuned | {"optimizer.lr": power(optimum.fitted)}


def _check(
    studied: Recipe, target: Recipe, tuned: Mapping[str, str], optimum: Optimum, allow: Sequence[str]
) -> list[str]:
    """Differences that are worth saying. Raises ValueError for those that no hyperparameter survives."""
    differences = recipes.differences(studied, target)
    same_base_shapes = _have_same_base_shapes(studied, target)
    differing = {
        key: f"{key} is {ours!r} in the study and {theirs!r} in the target"
        for key, (ours, theirs) in differences.items()
        if key not in tuned and not (same_base_shapes and key in _BASE_SHAPES)
    }
    refused = {
        key: said
        for key, said in differing.items()
        if not (_is_in(key, _MAY_DIFFER) or differences.marks[key].at_resume)
    }
    if studied.parametrization.kind == "sp":
        refused["parametrization.kind"] = (
            "parametrization.kind is sp in the study: its best learning rate moves with width"
        )
    if optimum.kind == "edge":
        refused["optimizer.lr"] = (
            f"optimizer.lr: the best, {power(optimum.best)}, is at the end of those tried, so the minimum may lie "
            "beyond; extend the study"
        )
    if wrong := [said for key, said in refused.items() if key not in allow]:
        raise ValueError(f"no transfer: {'; '.join(wrong)} (--allow KEY lets one pass)")
    return [said for key, said in (differing | refused).items() if key in refused or _is_in(key, _NOTED)]


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _have_same_base_shapes(studied: Recipe, target: Recipe) -> bool:
    """Whether both have one base model, though one may state its width and the other a file."""
    if "sp" in (studied.parametrization.kind, target.parametrization.kind):
        return False
    return base_shapes.of_recipe(studied) == base_shapes.of_recipe(target)


def _findings(study: Study, optimum: Optimum, best: Trial) -> dict[str, Any]:
    trials = study.trials()
    return {
        "data_fingerprint": study.facts["data"]["fingerprint"],
        "git_revisions": sorted({revision for trial in trials for revision in _git_revisions(trial)}),
        "metric": study.metric,
        "trials": count_states(trials),
        "best_trial": {"name": best.name, "overrides": list(best.overrides), "value": best.value},
        "width": best.recipe.model.width,
        "best_log2_lr": optimum.best,
        "fitted_log2_lr": optimum.fitted,
        "uncertainty_log2_lr": optimum.uncertainty,
    }


def _git_revisions(trial: Trial) -> list[str]:
    """The revisions of the code that ran a trial, where it was a checkout."""
    path = trial.run / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    return [start["git_revision"] for start in starts if start["git_revision"] is not None]


def _describe_base_shapes(target: Recipe) -> dict[str, Any] | None:
    """Where the target's base shapes come from, and the sha256 of the .bsh file that `megadit shapes make` writes."""
    parametrization = target.parametrization
    if parametrization.kind == "sp":
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.bsh"
        base_shapes.save(base_shapes.of_recipe(target), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": parametrization.base_shapes, "width": parametrization.base_width, "sha256": sha256}


def _cost_fraction(study: Study, target: Recipe) -> float:
    """Training FLOPs of all trials, pruned and unfinished ones as far as they went, over those of the target's run.

    Text counts as the longest caption of the study's data in both (PixArt pads to max_text_tokens).
    """
    max_text_tokens = study.facts["data"]["max_text_tokens"]
    spent = 0
    for trial in study.trials():
        images = len(Curve.read(trial.run).losses) * trial.recipe.training.batch_size
        spent += images * _num_flops(trial.recipe.model, max_text_tokens)
    return spent / (target.training.num_images * _num_flops(target.model, max_text_tokens))


def _num_flops(model: ModelConfig, max_text_tokens: int) -> int:
    """To train on one image once."""
    num_text_tokens = model.conditions.max_text_tokens or max_text_tokens
    return training_flops(model, [num_text_tokens])
