"""What rank 0 tells: JSON lines always, TensorBoard, a progress bar on a terminal and plain lines elsewhere."""

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from megadit.files import write_text
from megadit.recipe import Stage

logger = logging.getLogger(__name__)


class Metrics:
    """Writes RUN/metrics.jsonl and RUN/tensorboard; continues both from `images_seen`."""

    def __init__(self, run: Path, images_seen: int, stage: Stage) -> None:
        # Which stage a line is of, where there are several.
        self._stage = {"stage": stage.number} if stage.num_stages > 1 else {}
        path = run / "metrics.jsonl"
        _drop_after(path, images_seen)
        self._lines = path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=images_seen + 1)
        console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images  {task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=stage.last_image, completed=images_seen, status="")

    def __enter__(self) -> "Metrics":
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()
        self._lines.close()
        self._board.close()

    def progress(self, images_seen: int, status: str) -> None:
        """Move the progress bar; costs nothing elsewhere."""
        self._progress.update(self._task, completed=images_seen, status=status)

    def log(self, kind: str, images: int, text: str, **values: Any) -> None:
        """One line of metrics.jsonl, its numbers to TensorBoard, and one line of text where there is no terminal."""
        self._lines.write(json.dumps({"kind": kind, "images": images, **self._stage, **values}) + "\n")
        self._lines.flush()
        prefix = f"{kind}/{values['weights']}" if "weights" in values else kind
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{prefix}/{name}", value, images)
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if item is not None:
                        self._board.add_scalar(f"{prefix}/{name}/{index}", item, images)
        if self._progress.disable or kind != "train":
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)


def _drop_after(path: Path, images_seen: int) -> None:
    """Remove the lines of steps that a resumed run will do again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _is_kept(line, images_seen)]
    write_text(path, "".join(kept))


def _is_kept(line: str, images_seen: int) -> bool:
    try:
        return bool(json.loads(line)["images"] <= images_seen)
    except json.JSONDecodeError:  # a killed process can leave half a line at the end
        logger.warning("metrics.jsonl: dropped a line that was cut short")
        return False
