"""What the packer reads from: samples by number, wherever they lie."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}  # the Fitzpatrick modifiers of Unicode
KEY_PATTERN = re.compile(r"[A-Za-z0-9_\-]{1,80}")  # a dot would end the key in a WebDataset


class SourceError(ValueError):
    """What is wrong with a source, and where."""


@dataclass(frozen=True)
class SourceSample:
    """One sample as it is found: the file of the picture, its caption (None where there are none), its metadata."""

    key: str
    picture: bytes
    caption: str | None
    metadata: dict[str, Any] | None = None


class Source(Protocol):
    """Samples by their numbers, from 0.

    digest: of all that is there, so that a pack knows what it was made from. in_order: whether packing should keep the
    order, since neighbours are read together. Methods raise SourceError and StorageError.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def in_order(self) -> bool: ...
    @property
    def has_captions(self) -> bool: ...
    @property
    def has_metadata(self) -> bool: ...

    def key(self, number: int) -> str:
        """The key of a sample."""

    def select(self, where: Sequence[str]) -> np.ndarray:
        """Numbers, int64, sorted, of the samples whose metadata fulfil every `field=value`; at least one."""

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Height and width of the pictures, int64 [N, 2]."""

    def classes(self, numbers: np.ndarray, label: str | None) -> tuple[tuple[str, ...], np.ndarray | None]:
        """All classes, and those of the samples as places among them, int32 [N]; () and None without classes."""

    def read(self, numbers: np.ndarray) -> list[SourceSample]:
        """The samples, in the order of `numbers`. May be called from several threads."""


def concept(key: str) -> str:
    """What the picture shows: its key without skin tones. Variants of one picture have one concept."""
    return "-".join(part for part in key.split("-") if part not in SKIN_TONES)
