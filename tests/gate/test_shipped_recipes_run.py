"""The gate: whatever ships is packed for, trains two steps and samples, on every engine.

A recipe is shrunk in width, depth, batch and number of images; channels, resolution, text features, REPA, precision,
parametrization, objective and the options of its engine stay. Blocks are not compiled: that takes a minute a model, and
tests/engines/test_options.py does it.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from megadit.launcher.forked import ForkedRanks
from megadit.recipe import RECIPE_FOLDER, Recipe, load, stages_of
from megadit.sampling.generate import sample

WAYS = {
    "single": ("single", 1, 1),
    "fsdp-2": ("fsdp", 2, 1),
    "hsdp-2x1": ("fsdp", 2, 2),
    "zero1-2": ("zero1", 2, 1),
    "zero2-2": ("zero2", 2, 1),
    "zero3-2": ("zero3", 2, 1),
}
NUM_STEPS = 2
BATCH_SIZE = 8
FEW_PATCHES = 256


def shrunk(name: str, way: str = "single") -> list[str]:
    """Overrides that make a recipe small, and put it on the engine and the ranks of `way`."""
    recipe = load(name)
    kind, num_ranks, num_replicas = WAYS[way]
    head_dim, images = recipe.model.head_dim, f"{NUM_STEPS * BATCH_SIZE}"
    changes = {
        "model.width": 2 * head_dim,
        "model.depth": 2,
        "training.batch_size": BATCH_SIZE,
        "training.num_images": images,
        "training.log_every_steps": 1,
        "data.num_streams": 4,
        "data.chunk_samples": 2,
        "data.chunks_per_group": 2,
        "data.num_workers": recipe.data.num_workers if kind == "single" else 0,
        "checkpoints.every_images": images,
        "engine.kind": kind,
        "engine.num_ranks": num_ranks,
        "engine.num_replicas": num_replicas,
        "engine.compile": "false",
        "hardware": "null",
    }
    if recipe.parametrization.kind == "mup":
        changes |= {"parametrization.base_shapes": "null", "parametrization.base_width": head_dim}
    if recipe.training.micro_batch_size is not None:
        changes["training.micro_batch_size"] = 2
    if recipe.validation is not None:
        changes |= {"validation.every_images": images, "validation.num_timesteps": 2, "validation.batch_size": 4}
    if recipe.model.feature_dim is not None:
        changes["model.repa.block"] = 1
    for number, stage in enumerate(recipe.stages):
        size = BATCH_SIZE if stages_of(recipe)[number].model.num_patches <= FEW_PATCHES else BATCH_SIZE // 2
        if "training" in stage:
            micro = ", micro_batch_size: 2" if "micro_batch_size" in stage["training"] else ""
            changes[f"stages.{number}.training"] = f"{{num_images: {NUM_STEPS * size}, batch_size: {size}{micro}}}"
        for section in ("checkpoints", "validation"):
            if section in stage:
                small = "" if section == "checkpoints" else ", batch_size: 2"
                changes[f"stages.{number}.{section}"] = f"{{every_images: {NUM_STEPS * size}{small}}}"
    return [f"{key}={value}" for key, value in changes.items()]


def forms() -> dict[str, list[str]]:
    """Names of recipes that are alike when they are shrunk, by the first of them."""
    alike: dict[str, list[str]] = {}
    for path in sorted(RECIPE_FOLDER.glob("*.yaml")):
        recipe = load(path.stem, shrunk(path.stem))
        facts = recipe.model_dump(mode="json", exclude={"name", "provenance"})
        alike.setdefault(json.dumps(facts, sort_keys=True), []).append(path.stem)
    return {names[0]: names for names in alike.values()}


FORMS = forms()


@pytest.fixture(scope="module")
def fed(
    pack_latents: Callable[[int, int], Path], pack_pixels: Callable[[int], Path]
) -> Callable[[str, str], tuple[list[str], Recipe]]:
    """The overrides that shrink a recipe and name data made for it, and the recipe with them."""

    def feed(name: str, way: str) -> tuple[list[str], Recipe]:
        recipe = load(name)
        model, pixel_space = recipe.model, recipe.model.in_channels == 3
        folder = pack_pixels(model.input_size) if pixel_space else pack_latents(model.in_channels, 8 * model.input_size)
        overrides = [*shrunk(name, way), f"data.url={folder}/train"]
        if recipe.data.validation_url is not None:
            overrides.append(f"data.validation_url={folder}/validation")
        if model.conditions.num_classes is not None:
            manifest = json.loads((folder / "train" / "manifest.json").read_text())
            overrides.append(f"model.num_classes={len(manifest['labels'])}")
        for number, stage in enumerate(recipe.stages):
            if "data" in stage:
                size = stages_of(recipe)[number].model.input_size
                at_size = pack_pixels(size) if pixel_space else pack_latents(model.in_channels, 8 * size)
                urls = f"{{url: {at_size}/train, validation_url: {at_size}/validation}}"
                overrides.append(f"stages.{number}.data={urls}")
        return overrides, load(name, overrides)

    return feed


def test_every_recipe_is_in_the_gate() -> None:
    assert sorted(name for names in FORMS.values() for name in names) == sorted(
        path.stem for path in RECIPE_FOLDER.glob("*.yaml")
    )


def cases() -> Iterator[ParameterSet]:
    """Each form on each way. Pictures of 1024 pixels take a minute each time: by `make slow`, but for one way."""
    for name in FORMS:
        large = any(stage.model.num_patches > 4 * FEW_PATCHES for stage in stages_of(load(name)))
        for way in WAYS:
            yield pytest.param(name, way, marks=[pytest.mark.slow] if large and way != "fsdp-2" else [])


@pytest.mark.parametrize(("name", "way"), list(cases()))
def test_it_trains_and_samples(
    name: str,
    way: str,
    fed: Callable[[str, str], tuple[list[str], Recipe]],
    vae_folders: dict[int, Path],
    text_folder: Path,
    tmp_path: Path,
) -> None:
    overrides, recipe = fed(name, way)
    run = tmp_path / "run"
    with ForkedRanks(recipe.engine.num_ranks, name, overrides, run) as ranks:
        ranks.finish()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, NUM_STEPS * len(stages_of(recipe)) + 1))
    assert all(line["skipped_steps"] == 0 and line["grad_norm"] > 0 for line in trained)
    assert (recipe.validation is None) == (not any(line["kind"] == "validation" for line in lines))
    pixel_space = recipe.model.in_channels == 3
    folders = {} if pixel_space else {"encoder": str(text_folder), "vae": str(vae_folders[recipe.model.in_channels])}
    prompts = ["0"] if recipe.model.conditions.num_classes is not None else ["rooster"]
    assert sample(run, prompts, tmp_path / "grid.png", num_steps=2, **folders).stat().st_size > 0
