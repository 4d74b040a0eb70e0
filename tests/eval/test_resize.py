"""Resizers against their originals (torch-fidelity, torchmetrics, pytorch-fid, clean-fid) on random pictures."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from megadit.eval.resize import RESIZERS, tf1_bilinear

SIZES = [(64, 64), (299, 299), (37, 301), (512, 400)]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def pixels(request: pytest.FixtureRequest) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(*request.param, 3), dtype=np.uint8)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


@pytest.fixture(scope="module")
def clean_fid() -> Callable[[np.ndarray], torch.Tensor]:
    """clean-fid's own resizer, and what it does before the network: [3, 299, 299]."""
    module = pytest.importorskip("cleanfid.resize", reason="needs clean-fid (see requirements/tools.txt)")
    resize = module.build_resizer("clean")
    return lambda pixels: (torch.from_numpy(resize(pixels)).permute(2, 0, 1) - 128) / 128


def test_adm_equals_torch_fidelity_bit_for_bit(import_fidelity: Callable, pixels: np.ndarray) -> None:
    theirs = import_fidelity("torch_fidelity.interpolate_compat_tensorflow")
    resized = theirs.interpolate_bilinear_2d_like_tensorflow1x(
        channels_first(pixels).float(), size=(299, 299), align_corners=False
    )
    assert torch.equal(RESIZERS["adm"](pixels), (resized[0] - 128) / 128)


def test_tensorflow_1_puts_output_pixels_at_multiples_of_the_scale() -> None:
    """Four pixels of 0, 30, 60, 90 to eight: positions 0, 0.5, 1, ... of the old ones, the last repeated."""
    row = torch.tensor([0.0, 30, 60, 90]).expand(1, 4, 4)
    assert tf1_bilinear(row, 8)[0, 0].tolist() == [0, 15, 30, 45, 60, 75, 90, 90]
    assert interpolate(row[None], size=(8, 8), mode="bilinear")[0, 0, 0].tolist()[:2] == [
        0,
        7.5,
    ]  # where torch has them


def test_clean_equals_clean_fid(clean_fid: Callable, pixels: np.ndarray) -> None:
    assert torch.equal(RESIZERS["clean"](pixels), clean_fid(pixels))


def test_clean_keeps_what_lies_between_two_levels(make_pixels: Callable) -> None:
    """Not rounded to 0..255 after the resize, which is what clean-fid found others to get wrong."""
    levels = RESIZERS["clean"](make_pixels(0)) * 128 + 128
    assert (levels - levels.round()).abs().max() > 0.4 and levels.min() >= 0 and levels.max() <= 255


def test_pytorch_fid_equals_its_first_lines(pixels: np.ndarray) -> None:
    """ToTensor, then InceptionV3.forward of pytorch_fid/inception.py up to the first block."""
    x = channels_first(pixels).float() / 255
    x = interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(RESIZERS["pytorch-fid"](pixels), (2 * x - 1)[0], rtol=0, atol=0)


def test_torch_antialias_equals_torchmetrics_first_lines(pixels: np.ndarray) -> None:
    x = channels_first(pixels).float()
    x = interpolate(x, size=(299, 299), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(RESIZERS["torch-antialias"](pixels), ((x - 128) / 128)[0], rtol=0, atol=0)


def test_mup_crops_the_middle_and_shrinks_it_before_clean(clean_fid: Callable, pixels: np.ndarray) -> None:
    """CenterCropLongEdge and Lanczos to 256 of GigaGAN's evaluation, which the muP repository uses, then clean-fid."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    top, left = round((height - short) / 2), round((width - short) / 2)
    square = Image.fromarray(pixels[top : top + short, left : left + short])
    small = np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS))
    assert torch.equal(RESIZERS["mup"](pixels), clean_fid(small))


def test_protocols_differ_where_pictures_are_shrunk() -> None:
    """White noise of 1024 pixels: without antialiasing it stays as it is, which is why legacy FID aliases."""
    noise = np.random.default_rng(1).integers(0, 256, size=(1024, 1024, 3), dtype=np.uint8)
    spread = {name: 128 * resize(noise).std().item() for name, resize in RESIZERS.items()}
    assert spread["pytorch-fid"] > 40 and spread["adm"] > 40
    assert spread["clean"] < 25 and spread["torch-antialias"] < 20
