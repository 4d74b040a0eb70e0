"""From a training run to a folder of diffusers, through the command's function."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

from megadit.interop.commands import export_command
from megadit.recipe import Recipe, dump, parse
from megadit.sampling.generate import load_model
from megadit.training.trainer import train

SHORT = ("training.num_images=32", "checkpoints.every_images=32", "validation=null")


def as_pixart(recipe: Recipe) -> Recipe:
    tree = recipe.model_dump()
    sizes = {key: tree["model"][key] for key in ("input_size", "in_channels", "patch_size", "width", "head_dim")}
    tree["model"] = {"family": "pixart", "depth": 2, "text_dim": 384, "max_text_tokens": 256, **sizes}
    tree["objective"] = {"kind": "ddpm"}
    return parse(tree)


@torch.no_grad()
def test_mmdit_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train_run(tiny_recipe(*SHORT), tmp_path / "run")
    for ema in (None, "weight"):
        export_command(tmp_path / "run", tmp_path / "out", ema)
        model, _ = load_model(tmp_path / "run", ema)
        assert model.readout.multiplier == 0.5  # base width 32, width 64
        theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
        x, timestep = torch.randn(2, 3, 16, 16), torch.tensor([9.0, 800.0])
        text, pooled = torch.randn(2, 4, 384), torch.randn(2, 384)
        ours = model(x, timestep, text=text, text_lengths=torch.tensor([4, 4]), pooled=pooled)
        assert ours.abs().max() > 1e-4  # the readout starts at zero
        torch.testing.assert_close(ours, theirs(x, text, pooled, timestep).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pixart_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train_run(as_pixart(tiny_recipe(*SHORT)), tmp_path / "run")
    export_command(tmp_path / "run", tmp_path / "out")
    model, _ = load_model(tmp_path / "run")
    theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    x, timestep, text = torch.randn(2, 3, 16, 16), torch.tensor([9.0, 800.0]), torch.randn(2, 4, 384)
    ours = model(x, timestep, text=text, text_lengths=torch.tensor([4, 4]))
    assert ours.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs(x, text, timestep).sample, rtol=1e-5, atol=1e-5)


def train_run(recipe: Recipe, folder: Path) -> None:
    with torch.enable_grad():
        assert train(recipe, folder) == 0


def test_a_run_without_checkpoint_is_said(tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(tiny_recipe()))
    with pytest.raises(ValueError, match="no usable checkpoint"):
        export_command(tmp_path, tmp_path / "out")
