"""From a sample as it is found to the members that it has in a shard."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from megadit.batch import TextFeatures
from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.format.manifest import (
    CAPTION,
    FEATURES,
    FEATURES_SCALE,
    LATENT,
    METADATA,
    POOLED,
    TEXT,
    TEXT_SCALE,
    FeatureFacts,
    ImageFacts,
    LatentFacts,
    TextFacts,
)
from megadit.data.packing.arrays import to_bfloat16_bits, to_float16, to_int8, to_npy
from megadit.data.packing.pixels import RESIZE, encode, to_tensor
from megadit.data.packing.settings import PIXELS_PER_TOKEN, PackError, PackSettings
from megadit.data.packing.source import Source, SourceSample
from megadit.objectives.image_encoder import ImageEncoder
from megadit.randomness import Purpose, generator

Members = dict[str, bytes]  # by kind


class Encoding:
    """How samples of `source` are packed: which members, and their bytes.

    Without a text encoder a sample keeps its caption alone, without an autoencoder its picture alone; an image encoder
    adds features. Raises PackError for what does not go together.
    """

    def __init__(
        self,
        source: Source,
        settings: PackSettings,
        text_encoder: TextEncoder | None,
        autoencoder: Autoencoder | None,
        image_encoder: ImageEncoder | None,
    ) -> None:
        self._settings, self._text_encoder, self._autoencoder = settings, text_encoder, autoencoder
        self._image_encoder = image_encoder
        self._captions, self._metadata = source.has_captions, source.has_metadata
        if text_encoder is not None and not source.has_captions:
            raise PackError(
                f"{source.name} has no captions to encode; join them (`megadit data caption`), or pack without text"
            )
        if not settings.keep_pictures and autoencoder is None:
            raise PackError("without pictures there must be latents: give an autoencoder, or keep the pictures")
        self.image, self.latent, self.text = self._image_facts(), self._latent_facts(), self._text_facts()
        self.features = self._feature_facts()
        self.members = self._member_kinds()

    def encode(
        self, samples: Sequence[SourceSample], pictures: Sequence[Image.Image], numbers: Sequence[int]
    ) -> list[Members]:
        """The members of each sample, in the order of `members`. Pictures have one size. Raises PackError."""
        members: list[Members] = [self._plain(*pair) for pair in zip(samples, pictures, strict=True)]
        try:
            if self._autoencoder is not None:
                for found, latent in zip(members, self._latents(samples, pictures, numbers), strict=True):
                    found[LATENT] = latent
            if self._text_encoder is not None:
                features = self._text_encoder.encode([sample.caption or "" for sample in samples])
                for found, sample, caption in zip(members, samples, features, strict=True):
                    found |= self._text(caption, f"the text features of {sample.key!r}")
            if self._image_encoder is not None:
                for found, aligned in zip(members, self._features(samples, pictures), strict=True):
                    found |= aligned
        except ValueError as error:
            raise PackError(str(error)) from None
        return [{kind: found[kind] for kind in self.members} for found in members]

    def _plain(self, sample: SourceSample, picture: Image.Image) -> Members:
        members: Members = {}
        if self._settings.keep_pictures:
            members[self._settings.picture_format] = encode(picture, self._settings.picture_format)
        if self._metadata:
            members[METADATA] = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False).encode()
        if self._captions:
            assert sample.caption is not None
            members[CAPTION] = sample.caption.encode()
        return members

    def _latents(
        self, samples: Sequence[SourceSample], pictures: Sequence[Image.Image], numbers: Sequence[int]
    ) -> list[bytes]:
        assert self._autoencoder is not None
        mean, std = (part.cpu() for part in self._autoencoder.encode(_stack(pictures)))
        to_bits = to_float16 if self._settings.latent_dtype == "float16" else to_bfloat16_bits
        found = []
        for row, (sample, number) in enumerate(zip(samples, numbers, strict=True)):
            if self._settings.latents == "moments":
                latent = torch.stack([mean[row], std[row]])
            else:
                draws = generator(self._settings.seed, Purpose.PACKED_LATENT, number)
                draw = torch.from_numpy(draws.standard_normal(tuple(mean[row].shape), dtype=np.float32))
                latent = mean[row] + std[row] * draw
            found.append(to_npy(to_bits(latent, f"the latents of {sample.key!r}")))
        return found

    def _text(self, caption: TextFeatures, what: str) -> Members:
        tokens, pooled = caption.tokens.cpu(), to_npy(to_float16(caption.pooled.cpu(), what))
        if self._settings.text_dtype == "float16":
            return {TEXT: to_npy(to_float16(tokens, what)), POOLED: pooled}
        values, scales = to_int8(tokens, what)
        return {TEXT: to_npy(values), TEXT_SCALE: to_npy(scales), POOLED: pooled}

    def _features(self, samples: Sequence[SourceSample], pictures: Sequence[Image.Image]) -> list[Members]:
        assert self._image_encoder is not None and self.features is not None
        features_BTF = self._image_encoder.encode(_stack(pictures), self.features.grid).cpu()
        found = []
        for sample, features_TF in zip(samples, features_BTF, strict=True):
            what = f"the image features of {sample.key!r}"
            if self.features.dtype == "bfloat16":
                found.append({FEATURES: to_npy(to_bfloat16_bits(features_TF, what))})
            else:
                values, scales = to_int8(features_TF, what)
                found.append({FEATURES: to_npy(values), FEATURES_SCALE: to_npy(scales)})
        return found

    def _member_kinds(self) -> tuple[str, ...]:
        kinds = {
            self._settings.picture_format: self._settings.keep_pictures,
            METADATA: self._metadata,
            CAPTION: self._captions,
            LATENT: self._autoencoder is not None,
            TEXT: self._text_encoder is not None,
            TEXT_SCALE: self._text_encoder is not None and self._settings.text_dtype == "int8",
            POOLED: self._text_encoder is not None,
            FEATURES: self.features is not None,
            FEATURES_SCALE: self.features is not None and self.features.dtype == "int8",
        }
        return tuple(kind for kind, wanted in kinds.items() if wanted)

    def _image_facts(self) -> ImageFacts | None:
        if not self._settings.keep_pictures:
            return None
        return ImageFacts(member=self._settings.picture_format, resize=RESIZE)

    def _latent_facts(self) -> LatentFacts | None:
        if self._autoencoder is None:
            return None
        return LatentFacts(
            encoder=self._autoencoder.name,
            weights_sha256=self._autoencoder.weights_sha256,
            channels=self._autoencoder.channels,
            downsampling=self._autoencoder.downsampling,
            moments=self._settings.latents == "moments",
            scaling_factor=self._autoencoder.scaling_factor,
            shift_factor=self._autoencoder.shift_factor,
            dtype=self._settings.latent_dtype,
        )

    def _text_facts(self) -> TextFacts | None:
        if self._text_encoder is None:
            return None
        return TextFacts(
            encoder=self._text_encoder.name,
            weights_sha256=self._text_encoder.weights_sha256,
            dim=self._text_encoder.dim,
            pooled_dim=self._text_encoder.pooled_dim,
            max_tokens=self._text_encoder.max_tokens,
            dtype=self._settings.text_dtype,
        )

    def _feature_facts(self) -> FeatureFacts | None:
        settings = self._settings
        if self._image_encoder is None:
            if settings.feature_grid is not None:
                raise PackError(f"feature_grid {settings.feature_grid} is of no use without an image encoder")
            return None
        if settings.aspect_buckets:
            raise PackError("features of pictures are of squares only: leave out the image encoder or the buckets")
        if settings.feature_grid is None and settings.size % PIXELS_PER_TOKEN:
            raise PackError(
                f"size {settings.size} is no multiple of {PIXELS_PER_TOKEN}: state feature_grid, the model's tokens "
                "a side"
            )
        return FeatureFacts(
            encoder=self._image_encoder.name,
            weights_sha256=self._image_encoder.weights_sha256,
            dim=self._image_encoder.dim,
            grid=settings.feature_grid or settings.size // PIXELS_PER_TOKEN,
            dtype=settings.feature_dtype,
        )


def _stack(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """float32 [B, 3, H, W] in [-1, 1]."""
    return torch.stack([to_tensor(picture) for picture in pictures])
