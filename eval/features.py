"""Features of pictures: computed once for each set and network, kept on disk, shared by all metrics that take them.

Pictures are taken in batches of fixed composition, batch b by rank b % D, because the last bits of a convolution depend
on its batch: so features are a function of the pictures, not of the number of ranks or of interruptions. Each rank
appends records (picture, digest of its file, features, CRC-32) to a file of its own and syncs it after every batch.
What is there, whole, and belongs to the picture as it is now is not computed again.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megadit import checksums, journal
from megadit.distributed import Topology
from megadit.eval.resize import Pixels
from megadit.eval.weights import Located, Weights

logger = logging.getLogger(__name__)

NUM_DECODERS = 4


class Pictures(Protocol):
    """A set of pictures in an order that does not change."""

    name: str
    digests: list[str]
    """The SHA-256 of each file, hex."""
    groups: list[str]
    """The category of each picture, or "" where there are none."""

    def pixels(self, number: int) -> Pixels:
        """uint8 [H, W, 3]. Raises ValueError, with the name of the file, for what is no picture."""
        ...

    def prompt(self, number: int) -> str:
        """The text that the picture was made from. Raises ValueError where there is none."""
        ...


class Encoder(Protocol):
    """A network with what goes before it."""

    def prepare(self, pixels: Pixels) -> Tensor:
        """One picture as the network takes it, on the CPU."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Features of a batch, [B, width]; `prompts` is empty unless the feature set asks for them."""
        ...


@dataclass(frozen=True)
class FeatureSet:
    """What a network says of one picture: `width` numbers, under a name that says network and resize."""

    name: str
    width: int
    weights: Weights
    build: Callable[[Path, torch.device], Encoder]
    takes_prompts: bool = False

    def record(self) -> np.dtype[np.void]:
        """One picture on disk."""
        fields = [("picture", "<i8"), ("digest", "S64"), ("crc32", "<u4"), ("features", "<f4", (self.width,))]
        return np.dtype(fields)


@dataclass(frozen=True)
class FeatureSettings:
    """How features are computed; only `batch_size` touches their last bits.

    `reference_folder` is where those of references are kept, for several sets of images; by default beside the images'.
    """

    batch_size: int
    topology: Topology
    reference_folder: Path | None = None


def extract(
    features: FeatureSet, located: Located, pictures: Pictures, folder: Path, settings: FeatureSettings
) -> None:
    """Complete the features of `pictures` in `folder`; the ranks share the work.

    Raises ValueError on every rank for a picture that is unreadable, of a single colour, or not the one that the list
    of finished units names, and for features that are not finite.
    """
    store = FeatureFiles(features, folder)
    topology = settings.topology
    missing = topology.on_first(lambda: store.missing(pictures))
    batches = _batches(len(pictures.digests), settings.batch_size)
    mine = [batch for batch in batches[topology.rank :: topology.size] if not missing.isdisjoint(batch)]
    if missing and topology.is_first:
        logger.info("%s of %s: %d of %d to do", features.name, pictures.name, len(missing), len(pictures.digests))
    topology.on_every(lambda: _extract(features, located, pictures, store, mine, settings))


def _batches(num_pictures: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, num_pictures)) for start in range(0, num_pictures, batch_size)]


@torch.inference_mode()
def _extract(
    features: FeatureSet,
    located: Located,
    pictures: Pictures,
    store: "FeatureFiles",
    batches: list[range],
    settings: FeatureSettings,
) -> None:
    if not batches:
        return
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would be a metric of their own
    encoder = features.build(located.path, settings.topology.device)
    with store.writer(settings.topology) as append:
        for batch, images in _prepared(encoder, pictures, batches):
            prompts = [pictures.prompt(number) for number in batch] if features.takes_prompts else []
            values = encoder(images.to(settings.topology.device), prompts).float().cpu()
            assert values.shape == (len(batch), features.width), f"{features.name}: {tuple(values.shape)}"
            if not bool(values.isfinite().all()):
                raise ValueError(f"{features.name}: features of {pictures.name} {batch} are not finite")
            append(batch, [pictures.digests[number] for number in batch], values.numpy())


def _prepared(encoder: Encoder, pictures: Pictures, batches: list[range]) -> Iterator[tuple[range, Tensor]]:
    """Each batch as one tensor; the pictures of the next one are read while the network works on this one."""

    def read(number: int) -> Tensor:
        return encoder.prepare(pictures.pixels(number))

    with ThreadPoolExecutor(NUM_DECODERS) as pool:

        def start(batch: range) -> list[Future[Tensor]]:
            return [pool.submit(read, number) for number in batch]

        coming = start(batches[0])
        for place, batch in enumerate(batches):
            images, coming = coming, start(batches[place + 1]) if place + 1 < len(batches) else []
            yield batch, torch.stack([image.result() for image in images])


class FeatureFiles:
    """The records of one set of pictures under one feature set, in a folder."""

    def __init__(self, features: FeatureSet, folder: Path) -> None:
        self._features, self._folder, self._record = features, folder, features.record()

    def missing(self, pictures: Pictures) -> set[int]:
        """The pictures without a record."""
        found: set[int] = set()
        for records in journal.read_arrays(self._folder, self._record):
            found.update(int(records["picture"][place]) for place in self._good(records, pictures))
        return set(range(len(pictures.digests))) - found

    def load(self, pictures: Pictures, columns: slice) -> Tensor:
        """Some columns of all features in the order of the pictures, float32 [N, width of the columns]."""
        width = len(range(self._features.width)[columns])
        values = np.full((len(pictures.digests), width), np.nan, dtype=np.float32)
        for records in journal.read_arrays(self._folder, self._record):
            good = self._good(records, pictures)
            values[records["picture"][good]] = records["features"][good, columns]
        assert not np.isnan(values).any(), f"{self._folder}: load() before extract()"
        return torch.from_numpy(values)

    @contextmanager
    def writer(self, topology: Topology) -> Iterator[Callable[[Sequence[int], Sequence[str], np.ndarray], None]]:
        """What appends a batch to this rank's file: pictures, their digests, features [B, width]."""
        with journal.appending(self._folder, topology.rank, topology.size, self._record) as append:

            def append_batch(numbers: Sequence[int], digests: Sequence[str], values: np.ndarray) -> None:
                records = np.empty(len(numbers), dtype=self._record)
                records["picture"], records["digest"], records["features"] = numbers, digests, values
                records["crc32"] = [checksums.crc32(row.tobytes()) for row in records["features"]]
                append(records.tobytes())

            yield append_batch

    def _good(self, records: "np.memmap[tuple[int], np.dtype[np.void]]", pictures: Pictures) -> list[int]:
        """Records that are whole and of a picture as it is now."""
        return [
            place
            for place, record in enumerate(records)
            if 0 <= (number := int(record["picture"])) < len(pictures.digests)
            and record["digest"] == pictures.digests[number].encode()
            and record["crc32"] == checksums.crc32(record["features"].tobytes())
        ]


def decode(data: bytes, name: str) -> Pixels:
    """The pixels of an image file, uint8 [H, W, 3]. Raises ValueError for what is no image or has only one colour."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    return checked(pixels, name)


def checked(pixels: Pixels, name: str) -> Pixels:
    """`pixels`. Raises ValueError where all are the same: that is what a model that has diverged draws."""
    if (pixels == pixels[0, 0]).all():
        raise ValueError(f"{name} is of a single colour, {tuple(pixels[0, 0].tolist())}: no score is given for it")
    return pixels
