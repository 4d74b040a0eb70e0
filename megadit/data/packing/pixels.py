"""Pictures: decoded, brought to a bucket's resolution, encoded."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from megadit.data.packing.settings import PictureFormat
from megadit.data.packing.source import SourceError

RESIZE = "lanczos"
JPEG_QUALITY = 95
DRAFT_MARGIN = 2  # a JPEG may be decoded at 1/2, 1/4 or 1/8 while that leaves so many times the resolution wanted


def fit(data: bytes, bucket: tuple[int, int], what: str) -> Image.Image:
    """The picture in the file `data` as RGB at height x width `bucket`: centre crop, then Lanczos.

    Transparent parts are white. Large JPEGs are decoded at a smaller scale first (libjpeg's), which is several times as
    fast. `what` names the picture in errors. Raises SourceError.
    """
    height, width = bucket
    return ImageOps.fit(decode(data, what, bucket), (width, height), Image.Resampling.LANCZOS)


def decode(data: bytes, what: str, least: tuple[int, int] | None = None) -> Image.Image:
    """The picture as RGB, transparent parts white, at its own size or (a JPEG) not far above height x width `least`.

    Raises SourceError.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data))
        if least is not None:
            picture.draft("RGB", (DRAFT_MARGIN * least[1], DRAFT_MARGIN * least[0]))
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{what} cannot be decoded: {error}") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def size_of(data: bytes, what: str) -> tuple[int, int]:
    """Height and width of the picture in the file `data`, from its header. Raises SourceError."""
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except (UnidentifiedImageError, OSError) as error:
        raise SourceError(f"{what} cannot be decoded: {error}") from error
    return height, width


def encode(picture: Image.Image, picture_format: PictureFormat) -> bytes:
    """The file of a picture: PNG, lossless, or JPEG of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    if picture_format == "png":
        picture.save(buffer, format="PNG")
    else:
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def to_tensor(picture: Image.Image) -> Tensor:
    """float32 [3, H, W] in [-1, 1]."""
    pixels_HWC = torch.from_numpy(np.array(picture))
    return pixels_HWC.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0)
