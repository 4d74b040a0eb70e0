"""A run that begins with weights from elsewhere: the function is the same here, and nothing else comes along."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megadit import models
from megadit.distributed import ALONE
from megadit.engines.base import Shard
from megadit.interop.commands import load_published_command
from megadit.interop.diffusers import peer
from megadit.interop.starting_weights import source_of
from megadit.parametrization.initialisation import initial_value
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe, dump
from megadit.sampling.generate import load_model, load_weights
from megadit.training import checkpoint, run_folder, trainer
from megadit.training.checkpoint.export import convert

SHORT = ("training.num_images=32", "checkpoints.every_images=32", "validation=null", "optimizer.schedule=constant")
FSDP_2 = ("engine.kind=fsdp", "engine.num_ranks=2")


@pytest.fixture
def start(run_ranks: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Train `recipe` from the weights at a place; the folder of the run."""

    def begin(recipe: Recipe, place: Path, kind: str | None = None, run: Path | None = None) -> Path:
        run = run or tmp_path / "run"
        if recipe.engine.kind == "single":
            assert trainer.train(recipe, run, source=source_of(str(place), kind)) == 0
        else:
            run_ranks("train.py", recipe.engine.num_ranks, recipe=recipe, run=run, place=str(place), kind=kind)
        return run

    return begin


def first(run: Path) -> Path:
    """The checkpoint of 0 images."""
    return run / "checkpoints" / "images-0000000000"


def outputs(recipe: Recipe, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    config = recipe.model
    x, timestep_B = torch.randn(2, config.in_channels, config.input_size, config.input_size), torch.tensor([100.0, 900])
    if config.conditions.num_classes is not None:
        return model(x, timestep_B, labels=torch.tensor([0, 2]))
    text, pooled = torch.randn(2, 5, config.text_dim), torch.randn(2, config.pooled_dim)
    return model(x, timestep_B, text=text, text_lengths=torch.tensor([5, 5]), pooled=pooled)


def set_random(model: nn.Module) -> nn.Module:
    """No weight at a value that hides a mistake (0 or 1)."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and "table" not in name
        parameter.detach().normal_(std=parameter[0].numel() ** -0.5 if is_matrix else 0.2)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("way", [(), FSDP_2], ids=["single", "fsdp"])
def test_the_weights_of_another_run(
    way: tuple[str, ...], reference: Any, tiny_recipe: Callable[..., Recipe], start: Callable[..., Path]
) -> None:
    """Of its newest checkpoint, the first average; the run goes on without it, as it would have."""
    run = start(tiny_recipe(*SHORT, *way), reference.folder)
    average = checkpoint.read_tensors(reference.checkpoints()[-1], "ema_0.9")
    for kind in ("weight", "ema_0.9"):
        for name, values in checkpoint.read_tensors(first(run), kind).items():
            assert torch.equal(values, average[name])
    assert all(not slot.any() for kind in ("exp_avg", "exp_avg_sq") for slot in _state(first(run), kind))
    facts = json.loads((run / "started_from.json").read_text())
    assert (facts["place"], facts["weights"], facts["drawn_anew"]) == (str(reference.folder), "ema_0.9", [])
    curve = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "images-0000000032")
    assert trainer.train(tiny_recipe(*SHORT), run) == 0
    losses = [
        [json.loads(line)["loss"] for line in text.splitlines()]
        for text in (curve, (run / "metrics.jsonl").read_text())
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] < 0.9 * reference.curve()["loss"][0]


def _state(path: Path, slot: str) -> list[Tensor]:
    shapes = checkpoint.read_header(path).shapes.items()
    shards = {name: Shard(torch.Size(shape), 0, torch.full(shape, torch.nan).view(-1)) for name, shape in shapes}
    checkpoint.load_weights(path, slot, shards, ALONE)
    return [shard.values for shard in shards.values()]


def test_another_multiplier_is_folded(
    reference: Any, tiny_recipe: Callable[..., Recipe], start: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    recipe = tiny_recipe(*SHORT, "parametrization.base_width=16", "parametrization.output_mult=3")
    run = start(recipe, reference.checkpoints()[-1], "weight")
    assert "is scaled by 0.666667: its multiplier is 0.5 there, 0.75 here" in caplog.text
    model, there = load_model(reference.folder, "weight")
    expected = outputs(there, model)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        outputs(recipe, load_weights(recipe, first(run), "weight")), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["file", "model folder"])
def test_published_weights_of_other_classes(
    layout: str,
    twin: Callable[..., Recipe],
    start: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At another resolution, too; the model itself, without a parametrization, says what they compute."""
    caplog.set_level("INFO")
    recipe = twin("dit-xl2-mup-cpu", "training={num_images: 32, batch_size: 16}", "validation=null")
    same = {"input_size": 32, "num_classes": recipe.model.num_classes}
    model = set_random(models.build(recipe.model.model_copy(update=same)))
    place = tmp_path / "DiT.pt"
    torch.save(model.state_dict(), place)
    if layout == "model folder":
        place = tmp_path / "folder"
        (tmp_path / "large.yaml").write_text(dump(recipe))
        load_published_command(str(tmp_path / "large.yaml"), tmp_path / "DiT.pt", place, ["model.input_size=32"])
        # A folder says by its recipe how its readout is scaled: here as in the run.
        run = start(recipe, place)
        weights = checkpoint.read_tensors(first(run), "weight")
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
        return
    run = start(recipe, place)
    model_here = models.build(recipe.model)
    model_here.load_state_dict(dict(model.named_parameters()), strict=False)
    expected = outputs(recipe, model_here.eval())
    found = outputs(recipe, load_weights(recipe, first(run), "weight"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    fewer = set_random(models.build(recipe.model.model_copy(update={"num_classes": 3})))
    torch.save({"model": fewer.state_dict(), "ema": fewer.state_dict()}, tmp_path / "few.pt")
    run = start(recipe, tmp_path / "few.pt", run=tmp_path / "few")
    assert "y_embedder.embedding_table.weight has another number of rows there: it is drawn anew" in caplog.text
    weights = checkpoint.read_tensors(first(run), "weight")
    table = {spec.name: spec for spec in build_table(recipe)}
    name = "y_embedder.embedding_table.weight"
    assert torch.equal(weights[name], initial_value(table[name], recipe.seed))
    assert torch.equal(weights["x_embedder.proj.weight"], fewer.state_dict()["x_embedder.proj.weight"])


def test_a_folder_of_diffusers(tiny_recipe: Callable[..., Recipe], start: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(*SHORT)
    theirs = set_random(peer(recipe.model))
    theirs.save_pretrained(tmp_path / "folder" / "transformer")
    run = start(recipe, tmp_path / "folder")
    torch.manual_seed(1)
    x, timestep_B = torch.randn(2, 3, 16, 16), torch.tensor([100.0, 900])
    text, pooled = torch.randn(2, 5, 384), torch.randn(2, 384)
    expected = theirs(x, text, pooled, timestep_B).sample
    found = outputs(recipe, load_weights(recipe, first(run), "weight"))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.width=96"],
            r"has weights of another model: patch_embed\.weight is \[64, 48\] there, \[96, 48\] here",
        ),
        (
            ["model.mlp_ratio=2"],
            r"has weights of another model: blocks\.0\.image\.mlp\.fc1\.weight is \[256, 64\] there, \[128, 64\] here",
        ),
        (["model.depth=3"], r"has weights of another model: blocks\.1\.text\.modulation\.weight is \[128, 64\] there"),
    ],
)
def test_weights_of_another_model(
    overrides: list[str], message: str, reference: Any, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_recipe(*SHORT, *overrides), tmp_path / "run", source=source_of(str(reference.folder), None))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_family(reference: Any, twin: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = twin("dit-xl2-mup-cpu", "validation=null")
    with pytest.raises(ValueError, match=r"has weights of another model: x_embedder\.proj\.weight is not there"):
        trainer.train(recipe, tmp_path / "run", source=source_of(str(reference.folder), None))


def test_a_run_starts_from_one_place(
    reference: Any,
    finished: Callable[..., Any],
    tiny_recipe: Callable[..., Recipe],
    start: Callable[..., Path],
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(*SHORT)
    run = start(recipe, reference.folder)
    start(recipe, reference.folder)  # once more, which goes on
    with pytest.raises(ValueError, match=r"was started from .* \(the first average\), not from .* \(weight\)"):
        start(recipe, reference.folder, "weight")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"was to start from .* and has no checkpoint yet: give --from-weights again"):
        trainer.train(recipe, run)
    start(recipe, reference.folder)
    begun = shutil.copytree(reference.folder, tmp_path / "begun")
    with pytest.raises(ValueError, match="has begun, and not from other weights"):
        start(tiny_recipe(), reference.folder, run=begun)


def test_places_without_weights(reference: Any, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    convert(reference.folder, tmp_path / "converted.safetensors", None, "fp32", None)
    (tmp_path / "empty").mkdir()
    for place, kind, message in (
        (tmp_path / "empty", None, "allowed: the folder of a run or of a checkpoint"),
        (tmp_path / "none.pt", None, "there is no such file"),
        (tmp_path / "converted.safetensors", None, "give the run instead"),
        (reference.folder, "ema_0.5", r"--weights ema_0\.5: .* has weight, ema_0\.9"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(tiny_recipe(*SHORT), tmp_path / "run", source=source_of(str(place), kind))
    assert not (tmp_path / "run").exists()
    assert run_folder.load_recipe(reference.folder) == tiny_recipe()
