"""From the bytes of a sample to what the model sees: pixels or latents, text features or a caption.

Pictures that lie as they were found are brought to their bucket by `pillow-draft-bicubic`: libjpeg decodes at the
smallest of 1/1, 1/2, 1/4, 1/8 that still covers the bucket, Pillow's bicubic filter makes one pass from the centre
crop. Entropy decoding aside, that is the cost of the small picture, not of the large one.
"""

import io
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.batch import TextFeatures
from megadit.data.format.manifest import CAPTION, LATENT, POOLED, TEXT, TEXT_SCALE, LatentFacts, Manifest, TextFacts
from megadit.data.format.members import Members

NPY_MAGIC, NPY_PREFIX_BYTES = b"\x93NUMPY\x01\x00", 10


class DecodeError(ValueError):
    """Bytes that are not a picture, an array or a text."""


@dataclass(frozen=True)
class Content:
    """One decoded sample. image: pixels in [-1, 1] or latents, float32 [C, H, W]; std: of latents that are drawn.

    caption: where there is one and no features.
    """

    image: Tensor
    std: Tensor | None
    text: TextFeatures
    caption: str | None


class Decoder:
    """Decodes the samples of a data set. `kinds`: the members that this takes, all others need not be read."""

    def __init__(self, manifest: Manifest) -> None:
        assert manifest.image is not None or manifest.latent is not None, "a data set has pictures or latents"
        self._image, self._latent, self._text = manifest.image, manifest.latent, manifest.text
        self._has_caption = self._text is None and CAPTION in manifest.members
        wanted = {LATENT} if manifest.image is None or manifest.latent is not None else {manifest.image.member}
        wanted |= {TEXT, TEXT_SCALE, POOLED} if self._text else {CAPTION}
        self.kinds = tuple(kind for kind in manifest.members if kind in wanted)

    def decode(self, members: Members, height: int, width: int) -> Content:
        """The content of one sample, its picture brought to height x width pixels. Raises DecodeError."""
        std = None
        if self._latent is not None:
            image, std = decode_latent(members[LATENT], self._latent)
        else:
            assert self._image is not None
            pixels_HWC = torch.from_numpy(decode_picture(members[self._image.member], height, width))
            image = pixels_HWC.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()
        text = (
            TextFeatures(torch.zeros(0, 0), torch.zeros(0)) if self._text is None else decode_text(members, self._text)
        )
        return Content(image, std, text, decode_caption(members[CAPTION]) if self._has_caption else None)

    def settle(self, content: Content, draws: np.random.Generator) -> Tensor:
        """What the model sees, float32 [C, H, W]; latents of mean and std are drawn, shifted and scaled."""
        if self._latent is None:
            return content.image
        latent = content.image
        if content.std is not None:
            draw = torch.from_numpy(draws.standard_normal(tuple(latent.shape), dtype=np.float32))
            latent = latent + content.std * draw
        return (latent - self._latent.shift_factor) * self._latent.scaling_factor


def decode_picture(data: bytes | memoryview, height: int, width: int) -> np.ndarray:
    """RGB uint8 [height, width, 3]: the largest centre crop of that shape, resized. Raises DecodeError."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.size != (width, height):
                scale = max(width / picture.width, height / picture.height)
                picture.draft("RGB", (round(picture.width * scale), round(picture.height * scale)))
            pixels = picture if picture.mode == "RGB" else picture.convert("RGB")
            if pixels.size != (width, height):
                crop = _centre_crop(pixels.width, pixels.height, height, width)
                pixels = pixels.resize((width, height), Image.Resampling.BICUBIC, box=crop)
            return np.array(pixels)
    # Pillow says SyntaxError for a broken PNG, and has no common base for its errors.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"not a picture that Pillow decodes: {error}") from error


def decode_latent(data: bytes | memoryview, facts: LatentFacts) -> tuple[Tensor, Tensor | None]:
    """The latent, or mean and std, float32 [C, H, W], as they are stored. Raises DecodeError."""
    stored = decode_array(data)
    if facts.dtype == "bfloat16":
        values = torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16).to(torch.float32)
    else:
        values = torch.from_numpy(stored.astype(np.float32))
    if values.dim() != 3 + facts.moments or values.shape[-3] != facts.channels:
        raise DecodeError(f"a latent of shape {list(values.shape)}, not of {facts.channels} channels")
    return (values[0], values[1]) if facts.moments else (values, None)


def decode_text(members: Members, facts: TextFacts) -> TextFeatures:
    """Tokens of the caption's true length and the pooled vector. Raises DecodeError."""
    tokens = decode_array(members[TEXT]).astype(np.float32)
    if facts.dtype == "int8":
        tokens *= decode_array(members[TEXT_SCALE]).astype(np.float32)[:, None]
    pooled = decode_array(members[POOLED]).astype(np.float32) if POOLED in members else np.zeros(0, np.float32)
    return TextFeatures(torch.from_numpy(tokens), torch.from_numpy(pooled))


def decode_caption(data: bytes | memoryview) -> str:
    """UTF-8. Raises DecodeError."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError(f"a caption that is not UTF-8: {error}") from error


def decode_array(data: bytes | memoryview) -> np.ndarray:
    """The array of a .npy file, read-only. Raises DecodeError.

    np.load evaluates the header anew each time, which costs several times the copy of 8 KB.
    """
    try:
        if bytes(data[: len(NPY_MAGIC)]) != NPY_MAGIC:
            raise ValueError("no magic string of a .npy file of version 1.0")
        (size,) = struct.unpack_from("<H", data, len(NPY_MAGIC))
        start = NPY_PREFIX_BYTES + size
        shape, dtype = _read_header(bytes(data[NPY_PREFIX_BYTES - 2 : start]))
        return np.frombuffer(data, dtype, offset=start).reshape(shape)
    except (ValueError, struct.error) as error:
        raise DecodeError(f"not an array: {error}") from error


@lru_cache(maxsize=1024)  # as many as there are shapes: lengths of captions, mostly
def _read_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if fortran:
        raise ValueError("its axes are in Fortran's order")
    return shape, dtype


def _centre_crop(full_width: int, full_height: int, height: int, width: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest part of the shape height x width, not rounded to whole pixels."""
    scale = max(width / full_width, height / full_height)
    left, top = max(0.0, (full_width - width / scale) / 2), max(0.0, (full_height - height / scale) / 2)
    return left, top, full_width - left, full_height - top
