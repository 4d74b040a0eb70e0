"""What the trainer gets: samples put together into batches, with every random draw they need."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class TextFeatures:
    """Features of one caption: tokens float32 [L, D] of its true length, pooled float32 [P]."""

    tokens: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Sample:
    """One picture with its draws: image and noise float32 [C, H, W], the uniforms in [0, 1); label: its class or 0.

    noise: [0] where it is to be drawn later; caption: where it has one and no features; replaced: whether another
    sample's contents took its place; features and pixels: of the batch, [0, 0] and [0] where there are none.
    """

    image: Tensor
    text: TextFeatures
    caption: str | None
    label: int
    noise: Tensor
    timestep_uniform: float
    drop_uniform: float
    epoch: int
    sample: int
    replaced: bool
    features: Tensor
    pixels: Tensor


@dataclass(frozen=True)
class Batch:
    """B samples; C, H, W of what the model sees, L tokens of the longest caption, D and P features.

    Features of the picture and its pixels beside latents are there where the objective needs them (REPA).

    images           float32 [B, C, H, W]: pixels in [-1, 1], or latents, shifted and scaled
    text             float32 [B, L, D], zero after each caption's end; L and D are 0 where there are no features
    text_lengths     int64 [B]
    pooled           float32 [B, P]; P is 0 where there is none
    labels           int64 [B], places in the manifest's `labels`; 0 where the data set has none
    noise            float32 [B, C, H, W], standard normal; [B, 0] where images are pixels of latents yet to be made
    timestep_uniform float32 [B] in [0, 1)
    drop_uniform     float32 [B] in [0, 1); 1 where the caption is never dropped
    epoch, sample    int64 [B]; `sample` is the place in the manifest
    replaced         int64 [B], 1 where the sample is corrupt and another one's contents are in its place
    features         float32 [B, T, F], of an image encoder, for each of T image tokens; [B, 0, 0] where there are none
    pixels           float32 [B, 3, H, W] in [-1, 1], of pictures whose images are latents and whose features are yet to
                     be made; otherwise [B, 0]
    captions         B texts where the data set has captions and no features of them; otherwise none
    """

    images: Tensor
    text: Tensor
    text_lengths: Tensor
    pooled: Tensor
    labels: Tensor
    noise: Tensor
    timestep_uniform: Tensor
    drop_uniform: Tensor
    epoch: Tensor
    sample: Tensor
    replaced: Tensor
    features: Tensor
    pixels: Tensor
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sample)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        columns = {name: column.to(device, non_blocking=True) for name, column in self._tensors().items()}
        return Batch(**columns, captions=self.captions)

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of `size` samples, in order."""
        columns = {name: column.split(size) for name, column in self._tensors().items()}
        return [
            Batch(
                **{name: parts[number] for name, parts in columns.items()},
                captions=self.captions[number * size : (number + 1) * size],
            )
            for number in range(len(columns["sample"]))
        ]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}


TENSORS = tuple(field.name for field in fields(Batch) if field.name != "captions")


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples in their order."""
    text, text_lengths, pooled = pad_text([sample.text for sample in samples])
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        text=text,
        text_lengths=text_lengths,
        pooled=pooled,
        labels=torch.tensor([sample.label for sample in samples]),
        noise=torch.stack([sample.noise for sample in samples]),
        timestep_uniform=torch.tensor([sample.timestep_uniform for sample in samples], dtype=torch.float32),
        drop_uniform=torch.tensor([sample.drop_uniform for sample in samples], dtype=torch.float32),
        epoch=torch.tensor([sample.epoch for sample in samples]),
        sample=torch.tensor([sample.sample for sample in samples]),
        replaced=torch.tensor([int(sample.replaced) for sample in samples]),
        features=torch.stack([sample.features for sample in samples]),
        pixels=torch.stack([sample.pixels for sample in samples]),
        captions=tuple(sample.caption for sample in samples if sample.caption is not None),
    )


def pad_text(features: Sequence[TextFeatures]) -> tuple[Tensor, Tensor, Tensor]:
    """Captions as text float32 [B, L, D] (zero after each end), lengths int64 [B] and pooled float32 [B, P]."""
    lengths = torch.tensor([len(caption.tokens) for caption in features])
    text = torch.nn.utils.rnn.pad_sequence([caption.tokens for caption in features], batch_first=True)
    return text, lengths, torch.stack([caption.pooled for caption in features])


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of several, in their order, text padded to the longest caption of all."""
    if len(batches) == 1:
        return batches[0]
    longest = max(batch.text.shape[1] for batch in batches)
    columns = {name: [getattr(batch, name) for batch in batches] for name in TENSORS}
    columns["text"] = [pad(text, (0, 0, 0, longest - text.shape[1])) for text in columns["text"]]
    captions = tuple(caption for batch in batches for caption in batch.captions)
    return Batch(**{name: torch.cat(tensors) for name, tensors in columns.items()}, captions=captions)
