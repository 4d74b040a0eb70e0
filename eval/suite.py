"""`megadit eval suite`: the tasks and metrics of a recipe's `eval:` section, on the checkpoints of its run.

RUN/eval/images-0000012800/WEIGHTS/TASK is a folder of generated images with its scores. What is there is not done
again, so the suite can be called while the run trains, and again after it.
"""

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megadit import recipe as recipes
from megadit.distributed import Topology
from megadit.eval import units
from megadit.eval.geneval.judging import PROTOCOLS
from megadit.eval.metrics.catalogue import find
from megadit.eval.picture_sets import Generated, fingerprint
from megadit.eval.scoring import score_folder
from megadit.eval.task_images import Options, generate
from megadit.eval.tasks.benchmarks import TaskOptions, load_task
from megadit.files import write_text
from megadit.recipe import Evaluation, EvaluationMetric, EvaluationTask
from megadit.sampling.generate import default_weights
from megadit.training import run_folder
from megadit.training.checkpoint import newest_first, newest_valid

logger = logging.getLogger(__name__)

DONE_FILE = "suite.json"  # what was scored on which images, so that it is not scored again
PACKAGE = "package:"


def read_section(run: Path, config: Path | None) -> Evaluation:
    """The `eval:` section of a run's recipe, or of another YAML file. Raises ValueError where there is none."""
    recipe = run_folder.load_recipe(run)
    source = config or run / "recipe.yaml"
    if config is not None:
        recipe = recipes.parse(recipe.model_dump(mode="json") | {"eval": _eval_of(config)}, str(config))
    if recipe.eval is None:
        raise ValueError(f"{source} has no section `eval`: give one by --config")
    return recipe.eval


def _eval_of(config: Path) -> Any:
    if not config.is_file():
        raise ValueError(f"{config}: no such file")
    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{config}: not valid YAML: {error}") from None
    return tree.get("eval") if isinstance(tree, Mapping) else None


def suite(run: Path, section: Evaluation, topology: Topology) -> list[Path]:
    """Generate and score what is missing; the folders of all tasks of the chosen checkpoints, oldest first.

    With `checkpoints: all` those are among them that were evaluated before the run removed them. Call it on all ranks
    of a process group. Raises ValueError as `generate` and `score` do.
    """
    weights = locate_weights(section.weights)
    for task in section.tasks:  # what is wrong with a name is said before anything is drawn
        for metric in task.metrics:
            if metric.name not in PROTOCOLS:
                find(metric.name, metric.resize)
    folders = _of_removed_checkpoints(run, section, topology)
    for path in _checkpoints(run, section, topology):
        if not topology.on_first(path.is_dir):
            logger.warning("checkpoint %s is gone: the run keeps fewer", path)
            continue
        kind = section.ema or default_weights(path)
        for task in section.tasks:
            folder = run / "eval" / path.name / kind / task.name
            _generate(task, path, folder, section, topology)
            for metric in task.metrics:
                _score_once(metric, folder, weights, section, topology)
            folders.append(folder)
    return sorted(folders)


def locate_weights(place: str) -> Path:
    """The folder of a section's `weights`. Raises ValueError for a package that is not installed."""
    if not place.startswith(PACKAGE):
        return Path(place)
    name, _, inside = place.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(name)  # does not run it
    if found is None or found.origin is None:
        raise ValueError(f"eval.weights {place!r}: no package {name} is installed")
    return Path(found.origin).parent / inside


def _checkpoints(run: Path, section: Evaluation, topology: Topology) -> list[Path]:
    folder = run / "checkpoints"
    newest = newest_valid(folder, topology)
    if newest is None:
        raise ValueError(f"{run} has no usable checkpoint yet")
    if section.checkpoints == "newest":
        return [newest]
    return topology.on_first(lambda: [path for path in reversed(newest_first(folder)) if path <= newest])


def _of_removed_checkpoints(run: Path, section: Evaluation, topology: Topology) -> list[Path]:
    """Whole folders of the section's tasks and weights whose checkpoint is not there any more."""
    if section.checkpoints == "newest":
        return []
    return topology.on_first(
        lambda: [
            folder
            for task in section.tasks
            for folder in (run / "eval").glob(f"images-*/{section.ema or '*'}/{task.name}")
            if not (run / "checkpoints" / folder.parts[-3]).is_dir() and _is_whole(folder)
        ]
    )


def _is_whole(folder: Path) -> bool:
    has_begun = (folder / "manifest.json").is_file()
    return has_begun and len(units.finished(folder)) == units.read_manifest(folder)["num_units"]


def _generate(task: EvaluationTask, path: Path, folder: Path, section: Evaluation, topology: Topology) -> None:
    prompts = Path(task.prompts) if task.prompts is not None else None
    wanted = load_task(task.task, TaskOptions(prompts, task.prompts_sha256, task.images_per_prompt, task.labels))
    options = Options(
        ema=section.ema,
        sampler=task.sampler,
        num_steps=task.num_steps,
        shift=task.shift,
        guidance_scale=task.guidance_scale,
        guidance_channels=task.guidance_channels,
        batch_size=section.batch_size,
        precision=section.precision,
        encoder=section.encoder,
        vae=section.vae,
    )
    generate(wanted, path, folder, options, topology)


def _score_once(metric: EvaluationMetric, folder: Path, weights: Path, section: Evaluation, topology: Topology) -> None:
    wanted = metric.model_dump(mode="json")
    if topology.on_first(lambda: _is_scored(folder, wanted)):
        return
    if topology.is_first:
        logger.info("%s: %s", folder, metric.name)
    reference = Path(metric.reference) if metric.reference is not None else None
    kept = folder.parents[2] / "references"  # RUN/eval: one for all checkpoints
    scores = score_folder(metric.name, folder, weights, reference, metric.resize, section.batch_size, topology, kept)
    topology.on_first(lambda: _note_scored(folder, wanted, [score["metric"] for score in scores]))


def _is_scored(folder: Path, wanted: Mapping[str, Any]) -> bool:
    pictures = fingerprint(Generated(folder))
    return any(
        entry["metric"] == wanted
        and entry["pictures"] == pictures
        and all((folder / "scores" / f"{name.replace('/', '_')}.json").is_file() for name in entry["scores"])
        for entry in _read_done(folder)
    )


def _note_scored(folder: Path, wanted: Mapping[str, Any], scores: list[str]) -> None:
    others = [entry for entry in _read_done(folder) if entry["metric"] != wanted]
    entry = {"metric": wanted, "pictures": fingerprint(Generated(folder)), "scores": scores}
    write_text(folder / DONE_FILE, json.dumps([*others, entry], indent=1) + "\n")


def _read_done(folder: Path) -> list[dict[str, Any]]:
    path = folder / DONE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
