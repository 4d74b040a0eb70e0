"""One rank: sets the variables that a launcher sets and calls `main` of another script here.

Run by runpy.run_path with the globals script, arguments, folder, rank, world_size and port.
"""

import logging
import os
import runpy
import sys
import traceback
from typing import Any

import torch

given: dict[str, Any] = dict(globals())
rank, folder = given["rank"], given["folder"]
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(given["world_size"])}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(given["port"]), "COLUMNS": "200"}
torch.set_num_threads(1)

with (folder / f"{rank}.log").open("w") as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"rank {rank}: %(message)s")
try:
    result = runpy.run_path(str(given["script"]))["main"](**given["arguments"])
except Exception as error:  # the test decides whether it was to be raised
    traceback.print_exc()
    result = error
partial = folder / f"{rank}.partial"
torch.save(result, partial)
partial.rename(folder / f"{rank}.pt")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo's threads abort the interpreter's ordinary shutdown now and then
