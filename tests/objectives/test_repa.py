"""The alignment loss against a DINOv2 of transformers called by hand; folders that are not one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from megadit.batch import Batch
from megadit.models.mmdit import MMDiTConfig
from megadit.objectives.image_encoder import encoder_cost
from megadit.objectives.repa import Alignment

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models with random weights: `plain`, `registers`, `bert`."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    plain = Dinov2Model(Dinov2Config(**SIZES, initializer_range=0.2))
    registers = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, initializer_range=0.2, num_register_tokens=3)
    )
    for model in (plain, registers):  # a class token, registers and positions that differ from zero
        for parameter in model.embeddings.parameters(recurse=False):
            torch.nn.init.normal_(parameter)
    plain.save_pretrained(root / "plain")
    registers.save_pretrained(root / "registers")
    BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(root / "bert")
    return root


def model(**changes: object) -> MMDiTConfig:
    settings: dict[str, object] = {"input_size": 16, "in_channels": 3, "patch_size": 4, "width": 64, "depth": 2}
    repa = {"block": 1, "feature_dim": 24}
    return MMDiTConfig.model_validate(settings | {"repa": repa} | changes)


def alignment(folder: Path, **changes: object) -> Alignment:
    return Alignment(str(folder), model(**changes), CPU, torch.float32)


def batch_of(images: torch.Tensor, **columns: torch.Tensor) -> Batch:
    """Pictures [B, 3, H, W], or latents with `features` or `pixels` beside them."""
    size = len(images)
    numbers, nothing = torch.zeros(size, dtype=torch.int64), torch.zeros(size, 0)
    others = dict.fromkeys(("text_lengths", "labels", "epoch", "sample", "replaced"), numbers)
    others |= dict.fromkeys(("pooled", "noise", "timestep_uniform", "drop_uniform", "pixels"), nothing)
    others |= dict.fromkeys(("text", "features"), torch.zeros(size, 0, 0))
    return Batch(images=images, **(others | columns))


def pictures(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", ["plain", "registers"])
def test_losses_are_the_cosines_with_the_features_of_the_patches(folders: Path, name: str) -> None:
    """4 x 4 tokens: the encoder sees 56 x 56 pixels."""
    images = pictures(3)
    predicted = 10 * torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(2))
    encoder = {"plain": Dinov2Model, "registers": Dinov2WithRegistersModel}[name].from_pretrained(folders / name).eval()
    pixels = torch.nn.functional.interpolate((images + 1) / 2, (56, 56), mode="bicubic", antialias=True)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        pixels[:, channel] = (pixels[:, channel] - mean) / std
    with torch.no_grad():
        hidden = encoder(pixels).last_hidden_state
    patches = hidden[:, 1 + getattr(encoder.config, "num_register_tokens", 0) :]
    assert patches.shape == predicted.shape
    expected = -torch.cosine_similarity(predicted, patches, dim=2).mean(1)
    losses = alignment(folders / name).losses(predicted, batch_of(images))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alignment(folders / name).losses(patches, batch_of(images)), torch.full((3,), -1.0))
    assert losses.std() > 1e-3  # pictures differ


def test_large_pictures_are_made_smaller_as_pillow_does(folders: Path) -> None:
    """A model of 2 x 2 tokens on 96 pixels: the encoder sees 28. Pillow's bicubic filter is antialiased, too."""
    smooth = torch.nn.functional.interpolate(pictures(1, 6), (96, 96), mode="bilinear")
    pixels = ((smooth[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
    small = np.asarray(Image.fromarray(pixels).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    shown = torch.from_numpy((small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float()
    with torch.no_grad():
        encoder = Dinov2Model.from_pretrained(folders / "plain").eval()
        expected = encoder(shown.permute(2, 0, 1)[None]).last_hidden_state[:, 1:]
    ours = alignment(folders / "plain", input_size=96, patch_size=48).features(batch_of(smooth))
    assert torch.cosine_similarity(ours, expected, dim=2).min() > 0.999


def test_the_gradient_is_bounded_where_the_prediction_is_zero(folders: Path) -> None:
    aligned = alignment(folders / "plain")
    for scale in (0.0, 1e-20, 1e-3):
        predicted = torch.full((2, 16, 24), scale, requires_grad=True)
        losses = aligned.losses(predicted, batch_of(pictures(2)))
        losses.sum().backward()
        assert predicted.grad is not None
        lengths = predicted.grad.norm(dim=2) * 16  # each of 16 tokens has a sixteenth of the loss
        torch.testing.assert_close(lengths, torch.ones(2, 16))
        assert losses.abs().max() <= scale * 24**0.5 + 1e-12


def test_the_encoder_is_frozen_and_fp32(folders: Path) -> None:
    aligned = alignment(folders / "plain")
    before = aligned.features(batch_of(pictures(2)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(aligned.features(batch_of(pictures(2))), before)
        predicted = torch.randn(2, 16, 24, dtype=torch.bfloat16, requires_grad=True)
        losses = aligned.losses(predicted, batch_of(pictures(2)))
    assert losses.dtype == before.dtype == torch.float32
    losses.sum().backward()
    assert not before.requires_grad


def break_folder(folders: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((folders / "plain" / name).read_bytes())
    change(folder)
    return folder


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "model_type"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "header"),
        (without_a_weight, "its weights lack layernorm.weight"),
    ],
)
def test_a_folder_that_is_broken(folders: Path, tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    folder = break_folder(folders, tmp_path / "broken", change)
    with pytest.raises(ValueError, match=rf"image encoder {folder}: cannot be loaded: .*{message}"):
        alignment(folder)


def test_what_is_no_encoder_for_this_model(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"image encoder {tmp_path}/nowhere: no such folder; give one with a DINOv2"):
        alignment(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"{folders}/bert: cannot be loaded: it is a bert, not one of dinov2"):
        alignment(folders / "bert")
    with pytest.raises(ValueError, match=rf"{folders}/plain: it has 24 features, model.repa.feature_dim is 768"):
        alignment(folders / "plain", repa={"block": 1, "feature_dim": 768})


def test_features_come_from_the_batch_from_pixels_or_from_pictures(folders: Path) -> None:
    """Of a model of latents: those that are stored, else of the pixels beside the latents."""
    images, latents = pictures(2), torch.zeros(2, 16, 16, 16)
    aligned = alignment(folders / "plain")
    expected = aligned.features(batch_of(images))
    assert torch.equal(aligned.features(batch_of(latents, pixels=images)), expected)
    stored = Alignment(None, model(in_channels=16), CPU, torch.float32)
    assert stored.features(batch_of(latents, features=expected)) is expected
    predicted = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(2))
    losses = [
        aligned.losses(predicted, batch_of(images)),
        stored.losses(predicted, batch_of(latents, features=expected)),
    ]
    assert torch.equal(*losses)


def test_bf16_is_near_to_fp32(folders: Path) -> None:
    predicted, batch = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(2)), batch_of(pictures(4))
    exact, rounded = (
        Alignment(str(folders / "plain"), model(), CPU, dtype).losses(predicted, batch)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() < 0.01  # of cosines


def test_what_dinov2_b_costs() -> None:
    """86.6 million parameters (arXiv 2304.07193), and of 256 patches and a class token about 2 FLOPs each."""
    found = encoder_cost(Dinov2Config(), grid=16)
    assert found.num_parameters == pytest.approx(86.6e6 - (37**2 - 16**2) * 768, rel=1e-3)  # positions of 37x37 there
    assert found.forward_flops == pytest.approx(2 * 85e6 * 257, rel=0.1)
