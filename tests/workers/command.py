"""Runs the command line with `words` in `folder`; forked, so that nothing has to be imported again."""

import os
import sys
from pathlib import Path

words: list[str]
folder: Path
log: Path
environment: dict[str, str]

os.environ.clear()  # the fork server keeps the environment of its own start
os.environ.update(environment)
os.chdir(folder)
with log.open("w") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)

import torch  # noqa: E402

torch.set_num_threads(1)
sys.argv = ["megadit", *words]
from megadit.cli import main  # noqa: E402

main()
