"""What a benchmark found: rows beside a named baseline, as text and as JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megadit.files import write_text

Cell = str | float | None  # None: there is no such figure


@dataclass(frozen=True)
class Table:
    """Rows of figures by column. `baseline` says what the column `ratio` is a ratio to."""

    title: str
    baseline: str
    rows: Sequence[dict[str, Cell]]
    beside: dict[str, Any] = field(default_factory=lambda: _beside())  # what it was measured on, and next to

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        cells = [columns, *([_shown(row.get(column)) for column in columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [not any(isinstance(row.get(column), str) for row in self.rows) for column in columns]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            ).rstrip()
            for row in cells
        ]
        where = ", ".join(f"{name} {value}" for name, value in self.beside.items())
        return "\n".join([self.title, f"ratio: {self.baseline}", *lines, where])


def write_json(tables: Sequence[Table], path: Path) -> None:
    """A list of tables as JSON: title, baseline, rows, and what they were measured beside."""
    write_text(path, json.dumps([asdict(table) for table in tables], indent=1) + "\n")


def _shown(value: Cell) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _beside() -> dict[str, Any]:
    """The machine, what runs on it, and how busy it has been with other things."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),  # of the last minute, this benchmark's own included
    }
