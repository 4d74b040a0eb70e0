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
from megadit.data.format.manifest import (
    CAPTION,
    FEATURES,
    FEATURES_SCALE,
    LATENT,
    POOLED,
    TEXT,
    TEXT_SCALE,
    FeatureFacts,
    LatentFacts,
    Manifest,
    TextFacts,
)
from megadit.data.format.members import Members

NPY_MAGIC, NPY_PREFIX_BYTES = b"\x93NUMPY\x01\x00", 10


class DecodeError(ValueError):
    """Bytes that are not a picture, an array or a text."""


@dataclass(frozen=True)
class Content:
    """One decoded sample. image: pixels in [-1, 1] or latents, float32 [C, H, W]; std: of latents that are drawn.

    caption: where there is one and no features. features and pixels: as those of a Sample.
    """

    image: Tensor
    std: Tensor | None
    text: TextFeatures
    caption: str | None
    features: Tensor
    pixels: Tensor


class Decoder:
    """Decodes the samples of a data set. `kinds`: the members that this takes, all others need not be read.

    with_features: whether samples get the image encoder's features, or where latents have none, the picture's pixels.
    """

    def __init__(self, manifest: Manifest, with_features: bool = False) -> None:
        assert manifest.image is not None or manifest.latent is not None, "a data set has pictures or latents"
        self._image, self._latent, self._text = manifest.image, manifest.latent, manifest.text
        self._features = manifest.features if with_features else None
        # Pictures that are what the model sees, or become latents later, are at hand without it.
        self._has_pixels = with_features and None not in (self._latent, self._image) and self._features is None
        self._has_caption = self._text is None and CAPTION in manifest.members
        wanted = {LATENT} if manifest.image is None or manifest.latent is not None else {manifest.image.member}
        wanted |= {TEXT, TEXT_SCALE, POOLED} if self._text else {CAPTION}
        wanted |= {FEATURES, FEATURES_SCALE} if self._features else set()
        wanted |= {manifest.image.member} if manifest.image and self._has_pixels else set()
        self.kinds = tuple(kind for kind in manifest.members if kind in wanted)

    def decode(self, members: Members, height: int, width: int) -> Content:
        """The content of one sample, its picture brought to height x width pixels. Raises DecodeError."""
        std = None
        if self._latent is not None:
            image, std = decode_latent(members[LATENT], self._latent)
        else:
            image = self._pixels(members, height, width)
        text = (
            TextFeatures(torch.zeros(0, 0), torch.zeros(0)) if self._text is None else decode_text(members, self._text)
        )
        caption = decode_caption(members[CAPTION]) if self._has_caption else None
        features = torch.zeros(0, 0) if self._features is None else decode_features(members, self._features)
        pixels = self._pixels(members, height, width) if self._has_pixels else torch.zeros(0)
        return Content(image, std, text, caption, features, pixels)

    def decoded_bytes(self, height: int, width: int, with_noise: bool) -> int:
        """Bytes that a sample of height x width pixels has in a batch: all of it is float32, and most here."""
        picture = 3 * height * width
        image = picture
        if self._latent is not None:
            per_side = self._latent.downsampling
            image = self._latent.channels * (height // per_side) * (width // per_side)
        text = self._text.max_tokens * self._text.dim + self._text.pooled_dim if self._text else 0
        features = self._features.grid**2 * self._features.dim if self._features else 0
        return 4 * ((1 + with_noise) * image + text + features + self._has_pixels * picture)

    def _pixels(self, members: Members, height: int, width: int) -> Tensor:
        """The picture, float32 [3, height, width] in [-1, 1]. Raises DecodeError."""
        assert self._image is not None
        pixels_HWC = torch.from_numpy(decode_picture(members[self._image.member], height, width))
        return pixels_HWC.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()

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
    values = _from_bfloat16(stored) if facts.dtype == "bfloat16" else torch.from_numpy(stored.astype(np.float32))
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


def decode_features(members: Members, facts: FeatureFacts) -> Tensor:
    """Features of each patch, float32 [grid * grid, dim]. Raises DecodeError."""
    stored = decode_array(members[FEATURES])
    if stored.shape != (facts.grid**2, facts.dim):
        raise DecodeError(f"image features of shape {list(stored.shape)}, not {[facts.grid**2, facts.dim]}")
    if facts.dtype == "bfloat16":
        return _from_bfloat16(stored)
    scale_T = decode_array(members[FEATURES_SCALE]).astype(np.float32)
    return torch.from_numpy(stored.astype(np.float32) * scale_T[:, None])


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


def _from_bfloat16(bits: np.ndarray) -> Tensor:
    """float32 of the bits of bfloat16 as uint16."""
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).to(torch.float32)


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
