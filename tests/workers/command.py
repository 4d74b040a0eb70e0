"""The command line, forked, so that nothing has to be imported again.

Run by runpy.run_path with the globals words, folder (to run in), log (what it prints) and environment.
"""

import os
import sys
from typing import Any

import torch

from megadit.cli import main

given: dict[str, Any] = dict(globals())
os.environ.clear()  # the fork server keeps the environment of its own start
os.environ.update(given["environment"])
os.chdir(given["folder"])
with given["log"].open("w") as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
torch.set_num_threads(1)
sys.argv = ["megadit", *given["words"]]
main()
