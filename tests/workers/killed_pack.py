"""Packs in forked processes; one kills itself before its n-th file operation, two others go on where it was."""

import os
import random
import re
import signal
import sys
import traceback
from itertools import count
from pathlib import Path
from typing import Any

from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackSettings
from megadit.data.packing.sources import open_source

CHANGES = ("tempfile.mkstemp", "os.rename", "os.mkdir")
NEVER = -1


def main(
    source: str, t5: str, settings: PackSettings, folder: Path, num_kills: int
) -> list[tuple[str, bool, dict[str, bytes]]]:
    """For each kill: before which operation, whether there was a manifest then, and the files in the end."""
    opened, encoder = open_source(source), TextEncoder.load(t5, max_tokens=60)

    def run(destination: Path, rank: int, world_size: int, kill_point: int = NEVER) -> tuple[int, list[str]]:
        """The signal or exit code that a rank ended with, and its operations."""
        log = folder / "operations"
        child = os.fork()
        if not child:
            try:
                die_before(kill_point, destination, log)
                pack(opened, str(destination), settings, encoder, rank=rank, world_size=world_size)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, log.read_text().splitlines()

    code, operations = run(folder / "clean", 0, 1)
    assert code == 0
    last = len(operations) - 1
    found = []
    for point in sorted({0, last} | {*random.Random(0).sample(range(1, last), num_kills - 2)}):
        destination = folder / f"killed-{point}"
        code, operations = run(destination, 0, 1, point)
        assert code == -signal.SIGKILL
        has_manifest = (destination / "validation" / "manifest.json").exists()
        codes = [run(destination, rank, 2)[0] for rank in (1, 0)]
        assert codes == [0, 0]
        found.append((operations[-1], has_manifest, contents(destination)))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All but what a killed process was just writing, unless it was a shard."""
    found = (path for path in folder.rglob("*") if path.is_file() and not re.match(r"\.(?!shard)", path.name))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def die_before(number: int, folder: Path, log: Path) -> None:
    """Kill this process before operation `number` on files of `folder`."""
    numbers = count()
    notes = log.open("wb", buffering=0)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and Path(str(arguments[0])).is_relative_to(folder):
            notes.write(f"{event} {Path(str(arguments[0])).name}\n".encode())
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
