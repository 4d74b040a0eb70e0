"""Checkpoints in the layouts of the published files: what is read, what is refused, and from the command on."""

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadit import models
from megadit.interop.commands import export_command, load_published_command
from megadit.interop.published import load_published, read_published
from megadit.models.dit import DiT, DiTConfig
from megadit.models.dit.diffusers import use_published_timesteps
from megadit.models.pixart import PixArt, PixArtConfig
from megadit.recipe import dump

PUBLISHED = {
    "dit": DiTConfig(width=72, depth=28),
    "pixart": PixArtConfig(width=72, depth=28, text_dim=16),
}


def weights(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


def dit_training_checkpoint(raw: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, Any]:
    """As DiT's train.py writes it."""
    opt = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    return {"model": raw, "ema": ema, "opt": opt, "args": argparse.Namespace(model="DiT-XL/2", global_seed=0)}


@pytest.mark.parametrize(("family", "count"), [("dit", 292), ("pixart", 437)])  # of PixArt's, two are buffers
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_bare_state_dict_of_published_depth_loads_strictly(
    family: str, count: int, suffix: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = models.build(PUBLISHED[family])
    model.to_empty(device="cpu")
    state = weights(model, seed=0)
    assert len(state) == count
    path = tmp_path / f"published{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    load_published(model, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_averaged_weights_are_preferred(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw, ema = {"w": torch.ones(2)}, {"w": torch.full((2,), 2.0)}
    contents = {"dit.pt": dit_training_checkpoint(raw, ema), "pixart.pth": {"state_dict": raw, "state_dict_ema": ema}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(read_published(tmp_path / name)["w"], ema["w"])
        assert torch.equal(read_published(tmp_path / name, prefer="raw")["w"], raw["w"])
    torch.save({"state_dict": raw, "epoch": 3}, tmp_path / "only_raw.pth")
    with caplog.at_level(logging.INFO):
        assert torch.equal(read_published(tmp_path / "only_raw.pth")["w"], raw["w"])
    assert "taking the weights under 'state_dict'" in caplog.text


def test_files_of_the_old_format_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_published(tmp_path / "old.pt")["w"], torch.ones(2))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_a_file_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(2)}, "args": Harmful()}, "harmful.pt")
    with pytest.raises(ValueError, match=r"harmful.pt: refused: loading it would execute \w+\.mkdir"):
        read_published(Path("harmful.pt"))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors", "short.pt"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:500] if name == "short.pt" else b"no checkpoint")
    with pytest.raises(ValueError, match=rf"{name}: .*damaged"):
        read_published(path)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    torch.save({"optimizer": {}, "epoch": 1}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="no weights under 'ema', 'state_dict_ema', 'model', 'state_dict'"):
        read_published(tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a dict, not list"):
        read_published(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"a checkpoint is a file \.pt, \.pth, \.safetensors"):
        read_published(tmp_path / "weights.bin")


def test_only_positions_may_be_missing(tmp_path: Path) -> None:
    model = PixArt(PixArtConfig(width=32, depth=1, head_dim=8, text_dim=8, input_size=8))
    positions = model.pos_embed.clone()
    state = weights(model, seed=1)
    del state["pos_embed"]
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    load_published(model, tmp_path / "a.pth")
    assert torch.equal(model.pos_embed, positions)
    assert torch.equal(model.t_block[1].weight, state["t_block.1.weight"])
    del state["y_embedder.y_embedding"]
    state["csize_embedder.mlp.0.weight"] = torch.ones(2, 2)  # of the 1024-pixel models
    torch.save({"state_dict": state}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"missing \(y_embedder.y_embedding\); 1 is unexpected \(csize_emb"):
        load_published(model, tmp_path / "b.pth")


def test_a_checkpoint_of_another_width_is_named(tmp_path: Path) -> None:
    narrow, wide = (DiT(DiTConfig(width=width, depth=1, head_dim=8, input_size=8)) for width in (32, 64))
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    before = narrow.x_embedder.proj.bias.clone()
    with pytest.raises(ValueError, match=r"21 have another shape \(pos_embed is \[1, 16, 64\], not \[1, 16, 32"):
        load_published(narrow, tmp_path / "wide.pt")
    assert torch.equal(narrow.x_embedder.proj.bias, before)


def test_from_a_published_checkpoint_to_diffusers(
    make_recipe: Callable, random_model: Callable, tmp_path: Path
) -> None:
    recipe = make_recipe("dit", timestep_freq_shift=0)
    (tmp_path / "tiny.yaml").write_text(dump(recipe))
    model = random_model(recipe)
    torch.save(dit_training_checkpoint({}, model.state_dict()), tmp_path / "0001000.pt")
    folder = tmp_path / "model"
    load_published_command(str(tmp_path / "tiny.yaml"), tmp_path / "0001000.pt", folder)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()

    export_command(folder, tmp_path / "exported", allow_timestep_mismatch=True)
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "exported" / "transformer").eval()
    use_published_timesteps(transformer)
    model.final_layer.linear.multiplier = 16 / 32  # base width / width, which follows from the recipe
    x, timestep, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 999])
    with torch.no_grad():
        expected = model(x, timestep.float(), labels=labels)
        torch.testing.assert_close(transformer(x, timestep, labels).sample, expected, rtol=1e-5, atol=1e-5)

    wider = make_recipe("dit", width=64)
    (folder / "recipe.yaml").write_text(dump(wider))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the model: of its tensors, \d+ have another"):
        export_command(folder, tmp_path / "exported")
    with pytest.raises(ValueError, match="leave out 'ema_0.9'"):
        export_command(folder, tmp_path / "exported", ema="ema_0.9")


def test_commands_refuse_what_they_cannot_do(make_recipe: Callable, tmp_path: Path) -> None:
    (tmp_path / "mmdit.yaml").write_text(dump(make_recipe("mmdit")))
    with pytest.raises(ValueError, match="no published checkpoints of model.family mmdit.*one of dit, pixart"):
        load_published_command(str(tmp_path / "mmdit.yaml"), tmp_path / "x.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="not a run folder"):
        export_command(tmp_path, tmp_path / "out")
