"""A list of prompts and how many images each gets; reading such lists from files."""

import csv
import hashlib
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SUFFIXES = (".txt", ".jsonl", ".csv")
CSV_COLUMNS = ("prompt", "caption", "text")  # what lists of captions call theirs
WHITE_SPACE = "\t\n\r"  # control characters that captions do have
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Task:
    """What to generate. The noise of an image is a function of (`id`, prompt number, image number).

    `records` are {"prompt", ...metadata}, by prompt number; `sha256` is that of the list that they come from, and
    `settings` is what else decides on them.
    """

    id: str
    version: int
    records: list[Record]
    images_per_prompt: int
    sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_units(self) -> int:
        return len(self.records) * self.images_per_prompt

    def prompts(self) -> list[Record]:
        """The lines of prompts.jsonl."""
        return [{**record, "index": index} for index, record in enumerate(self.records)]


def read_list(path: Path) -> tuple[list[Record], str]:
    """The prompts of a .txt (one a line), a .jsonl ({"prompt": ...} a line) or a .csv and the file's SHA-256.

    A .csv has a header with one of CSV_COLUMNS; its other columns are kept beside the prompt.
    Raises ValueError, with the line, for what is no prompt: an empty line, a character that no caption has.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"prompts {path}: must be a file ending in {', '.join(SUFFIXES)}")
    data, text = read_text(path)
    if path.suffix == ".csv":
        return _parse_csv(text, path), hashlib.sha256(data).hexdigest()
    lines = text.removesuffix("\n").split("\n")  # splitlines() also splits at characters that captions may have
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        record = _parse(line, where) if path.suffix == ".jsonl" else {"prompt": line.removesuffix("\r")}
        check_prompt(record.get("prompt"), where)
        records.append(record)
    return records, hashlib.sha256(data).hexdigest()


def read_text(path: Path) -> tuple[bytes, str]:
    """The bytes of a file and the UTF-8 text in them. Raises ValueError for a missing file and for another encoding."""
    if not path.is_file():
        raise ValueError(f"prompts {path}: no such file")
    data = path.read_bytes()
    try:
        return data, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} line {line}: not UTF-8: {error.reason} {data[error.start : error.end]!r}") from None


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object with a prompt but {type(record).__name__}")
    return record


def _parse_csv(text: str, path: Path) -> list[Record]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    column = next((name for name in CSV_COLUMNS if name in (rows.fieldnames or ())), None)
    if column is None:
        raise ValueError(f"{path}: no column {' or '.join(CSV_COLUMNS)} in its first line, but {rows.fieldnames}")
    records = []
    try:
        for row in rows:
            if None in row:
                raise ValueError(f"{path} line {rows.line_num}: more columns than in the first line")
            check_prompt(row[column], f"{path} line {rows.line_num}")
            others = {name: value for name, value in row.items() if name and name != column}
            records.append({"prompt": row[column], **others})
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num}: not CSV: {error}") from None
    return records


def check_prompt(prompt: object, where: str) -> None:
    """Raise ValueError unless `prompt` is a text with something in it and without characters that no caption has."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: no prompt in it, but {prompt!r}" if prompt is not None else f"{where}: no prompt")
    for character in prompt:
        control = unicodedata.category(character) in ("Cc", "Cs") and character not in WHITE_SPACE
        if control or character == REPLACEMENT:
            raise ValueError(f"{where}: the prompt has the character U+{ord(character):04X}, which no caption has")


def check_unique(records: Sequence[Record], where: str, advice: str) -> None:
    """Raise ValueError where two prompts are the same."""
    prompts = [record["prompt"] for record in records]
    for prompt, count in Counter(prompts).items():
        if count > 1:
            first = prompts.index(prompt)
            second = prompts.index(prompt, first + 1)
            raise ValueError(f"{where}: lines {first + 1} and {second + 1} have the same prompt {prompt!r}{advice}")


def check_count(found: int, wanted: int, where: str, what: str) -> None:
    """Raise ValueError for another number of prompts than a benchmark has."""
    if found != wanted:
        raise ValueError(f"{where} is not {what}: it has {found} prompts, not {wanted}")


def require(path: Path | None, task: str, source: str) -> Path:
    """The path of a list that is not shipped. Raises ValueError where none is given."""
    if path is None:
        raise ValueError(f"task {task} needs --prompts: {source}")
    return path
