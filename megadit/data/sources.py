"""Captioned pictures on their way into the packer: a folder or a zip file of one layout.

captions.jsonl      one JSON object a line: key, caption, and whatever else is known (tags, group, ...)
images/<key>.*      the pictures, in any format that Pillow reads
"""

import hashlib
import importlib.resources
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

SHIPPED = {"emoji": "emoji-128.zip"}  # name -> file in assets/
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}  # the Fitzpatrick modifiers of Unicode
KEY_PATTERN = re.compile(r"[A-Za-z0-9_\-]{1,80}")  # a dot would end the key in a WebDataset


class SourceError(ValueError):
    """What is wrong with a source, and where."""


class CaptionedFolder:
    """Pictures with captions in the layout above.

    `metadata` maps each key to its line of captions.jsonl, in the order of that file. `digest` is the sha256 of all
    that was read, so that a pack knows what it was made from. Raises SourceError.
    """

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
        self.digest = self._compute_digest(text)

    def image(self, key: str) -> Image.Image:
        """The picture of `key` as RGB, transparent parts on white."""
        try:
            picture: Image.Image = Image.open(io.BytesIO(self._files[key].read_bytes()))
            if not picture.has_transparency_data:
                return picture.convert("RGB")
            picture = picture.convert("RGBA")
        except (UnidentifiedImageError, OSError) as error:
            raise SourceError(f"{self.name}: the picture {key!r} cannot be decoded: {error}") from error
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")

    def select(self, where: Sequence[str]) -> list[str]:
        """Keys whose metadata fulfil every `field=value` of `where`. Raises SourceError when none does."""
        wanted = dict(_parse_condition(condition) for condition in where)
        for field in wanted:
            if not any(field in record for record in self.metadata.values()):
                known = sorted({name for record in self.metadata.values() for name in record})
                raise SourceError(f"{self.name}: no picture has the field {field!r}; there are {', '.join(known)}")
        keys = [
            key
            for key, record in self.metadata.items()
            if all(field in record and record[field] == value for field, value in wanted.items())
        ]
        if not keys:
            raise SourceError(f"{self.name}: no picture fulfils {' and '.join(where)}")
        return keys

    def _compute_digest(self, captions: str) -> str:
        digest = hashlib.sha256(captions.encode())
        for key, path in self._files.items():
            digest.update(key.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def open_source(name_or_path: str) -> CaptionedFolder:
    """The shipped pictures by name (`emoji`), or a folder or a zip file by path. Raises SourceError."""
    if name_or_path in SHIPPED:
        shipped = importlib.resources.files("megadit.data") / "assets" / SHIPPED[name_or_path]
        with importlib.resources.as_file(shipped) as path:
            return CaptionedFolder(zipfile.Path(io.BytesIO(path.read_bytes())), name_or_path)
    path = Path(name_or_path)
    if path.is_dir():
        return CaptionedFolder(path, name_or_path)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise SourceError(f"{name_or_path}: not a zip file")
        return CaptionedFolder(zipfile.Path(path), name_or_path)
    raise SourceError(f"no source {name_or_path!r}: give a folder, a zip file or one of {', '.join(SHIPPED)}")


def concept(record: Mapping[str, Any]) -> str:
    """What the picture shows: its key without skin tones. Variants of one picture have one concept."""
    return "-".join(part for part in record["key"].split("-") if part not in SKIN_TONES)


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
