"""Captioned pictures on their way into the packer: a folder or a zip file of one layout, or an indexed data set.

captions.jsonl      one JSON object a line: key, caption, and whatever else is known (tags, group, ...)
images/<key>.*      the pictures, in any format that Pillow reads

For data sets see packing/indexed_source.py.
"""

import hashlib
import importlib.resources
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megadit.data.format.manifest import MANIFEST_NAME
from megadit.data.packing.indexed_source import IndexedSource
from megadit.data.packing.pixels import decode, size_of
from megadit.data.packing.source import KEY_PATTERN, Source, SourceError, SourceSample

SHIPPED = {"emoji": "emoji-128.zip"}  # name -> file in assets/


class CaptionedFolder:
    """Pictures with captions in the layout above.

    `metadata` maps each key to its line of captions.jsonl, in the order of that file. `digest` is the sha256 of all
    that was read. Raises SourceError.
    """

    in_order, has_captions, has_metadata = False, True, True

    def __init__(self, root: Path | zipfile.Path, name: str) -> None:
        self.name = name
        self.metadata: dict[str, dict[str, Any]] = {}
        captions = root / "captions.jsonl"
        if not captions.is_file():
            raise SourceError(
                f"{name}: captions.jsonl is missing; a source is a folder or zip of captions.jsonl and images/"
            )
        text = captions.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                record = _parse(line, f"{name}: captions.jsonl line {number}")
                if record["key"] in self.metadata:
                    raise SourceError(f"{name}: captions.jsonl line {number}: the key {record['key']!r} occurs twice")
                self.metadata[record["key"]] = record
        if not self.metadata:
            raise SourceError(f"{name}: captions.jsonl is empty")
        images = root / "images"
        files = {path.name.rpartition(".")[0]: path for path in images.iterdir()} if images.is_dir() else {}
        if missing := [key for key in self.metadata if key not in files]:
            raise SourceError(f"{name}: {len(missing)} pictures are missing, the first is images/{missing[0]}.*")
        self._files = {key: files[key] for key in self.metadata}
        self._keys = list(self.metadata)
        self.digest = self._compute_digest(text)

    def key(self, number: int) -> str:
        return self._keys[number]

    def read(self, numbers: np.ndarray) -> list[SourceSample]:
        keys = [self._keys[number] for number in numbers.tolist()]
        return [
            SourceSample(key, self._files[key].read_bytes(), self.metadata[key]["caption"], self.metadata[key])
            for key in keys
        ]

    def image(self, key: str) -> Image.Image:
        """The picture of `key` as RGB, transparent parts on white."""
        return decode(self._files[key].read_bytes(), self._name(key))

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        return np.array([size_of(sample.picture, self._name(sample.key)) for sample in self.read(numbers)])

    def select(self, where: Sequence[str]) -> np.ndarray:
        wanted = dict(_parse_condition(condition) for condition in where)
        for field in wanted:
            if not any(field in record for record in self.metadata.values()):
                known = sorted({name for record in self.metadata.values() for name in record})
                raise SourceError(f"{self.name}: no picture has the field {field!r}; there are {', '.join(known)}")
        numbers = [
            number
            for number, record in enumerate(self.metadata.values())
            if all(field in record and record[field] == value for field, value in wanted.items())
        ]
        if not numbers:
            raise SourceError(f"{self.name}: no picture fulfils {' and '.join(where)}")
        return np.array(numbers, dtype=np.int64)

    def classes(self, numbers: np.ndarray, label: str | None) -> tuple[tuple[str, ...], np.ndarray | None]:
        if label is None:
            return (), None
        texts = []
        for number in numbers.tolist():
            record = self.metadata[self._keys[number]]
            if not isinstance(record.get(label), str):
                known = ", ".join(field for field, value in record.items() if isinstance(value, str))
                raise SourceError(
                    f"label {label!r}: the picture {record['key']!r} has no text in that field; it has one in {known}"
                )
            texts.append(record[label])
        labels = tuple(sorted(set(texts)))
        places = {text: place for place, text in enumerate(labels)}
        return labels, np.array([places[text] for text in texts], dtype=np.int32)

    def _name(self, key: str) -> str:
        return f"{self.name}: the picture {key!r}"

    def _compute_digest(self, captions: str) -> str:
        digest = hashlib.sha256(captions.encode())
        for key, path in self._files.items():
            digest.update(key.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def open_source(address: str) -> Source:
    """The shipped pictures by name (`emoji`), a folder or a zip file by path, or a data set by its address.

    Raises SourceError, ManifestError, StorageError.
    """
    path = Path(address)
    if address in SHIPPED:
        shipped = importlib.resources.files("megadit.data") / "assets" / SHIPPED[address]
        with importlib.resources.as_file(shipped) as path:
            return CaptionedFolder(zipfile.Path(io.BytesIO(path.read_bytes())), address)
    if "://" in address or (path / MANIFEST_NAME).is_file():
        return IndexedSource(address)
    if path.is_dir():
        return CaptionedFolder(path, address)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise SourceError(f"{address}: not a zip file")
        return CaptionedFolder(zipfile.Path(path), address)
    raise SourceError(
        f"no source {address!r}: give a folder, a zip file, a data set (the address of its manifest.json) or one of "
        f"{', '.join(SHIPPED)}"
    )


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in ("key", "caption")):
        raise SourceError(f"{where}: a line is an object with the texts key and caption")
    if not KEY_PATTERN.fullmatch(record["key"]):
        raise SourceError(f"{where}: the key {record['key']!r} may have letters, digits, - and _ only, at most 80")
    return record


def _parse_condition(condition: str) -> tuple[str, Any]:
    """`skin_tone=false` -> ("skin_tone", False); a value that is not JSON is a text."""
    field, separator, text = condition.partition("=")
    if not separator or not field:
        raise SourceError(f"the condition {condition!r} is not of the form field=value")
    try:
        return field, json.loads(text)
    except json.JSONDecodeError:
        return field, text
