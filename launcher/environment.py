"""Who started this process, and as which rank: torchrun, the deepspeed launcher, srun, or nobody.

Every launcher says it in environment variables of its own. `detect` reads them into one `Ranks` and `export` writes
the five that torch.distributed and DeepSpeed read. Nothing here imports torch.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

DEFAULT_MASTER_ADDR = "127.0.0.1"
SLURM_PORTS = range(20000, 30000)  # below Linux's ephemeral ports, so a free port is the rule


@dataclass(frozen=True)
class Ranks:
    """One process among all: 0 <= rank < world_size, and local_rank counts the processes of this node."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_addr: str = DEFAULT_MASTER_ADDR
    master_port: int | None = None  # None only when nobody else has to be found
    launcher: Literal["nobody", "torchrun", "deepspeed", "srun"] = "nobody"

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process, as one of its ranks."""
        return self.launcher != "nobody"


def detect(environ: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that the environment describes; rank 0 of 1 when it describes none.

    Raises ValueError when variables are missing or contradict each other.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "LOCAL_RANK" in environ:
        return _from_ranks(environ)
    if _number({"SLURM_STEP_NUM_TASKS": "1", **environ}, "SLURM_STEP_NUM_TASKS") > 1:
        return _from_slurm(environ)
    return Ranks()


def export(ranks: Ranks, environ: MutableMapping[str, str] | None = None) -> None:
    """Write RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for torch.distributed and DeepSpeed."""
    environ = os.environ if environ is None else environ
    environ["RANK"] = str(ranks.rank)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["WORLD_SIZE"] = str(ranks.world_size)
    environ["MASTER_ADDR"] = ranks.master_addr
    if ranks.master_port is not None:
        environ["MASTER_PORT"] = str(ranks.master_port)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[007-012,20]-ib,login1` gives `gpu007-ib`."""
    outside_brackets = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if outside_brackets is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodelist!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", outside_brackets[0])


def _from_ranks(environ: Mapping[str, str]) -> Ranks:
    launcher: Literal["torchrun", "deepspeed"] = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environ]:
        found = [name for name in names if name in environ]
        raise ValueError(
            f"the environment sets {', '.join(found)} but not {', '.join(missing)}: start the ranks with "
            f"torchrun, deepspeed or srun, or unset these variables to run alone"
        )
    return _checked(
        Ranks(
            rank=_number(environ, "RANK"),
            local_rank=_number(environ, "LOCAL_RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            master_addr=environ["MASTER_ADDR"],
            master_port=_number(environ, "MASTER_PORT"),
            launcher=launcher,
        )
    )


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if missing := [name for name in names if name not in environ]:
        raise ValueError(f"srun started several tasks but {', '.join(missing)} is not set")
    # All tasks of a step agree on the port without talking; another step of the job gets another one.
    job, step = (_number({name: "0", **environ}, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = SLURM_PORTS[(job * 7 + step) % len(SLURM_PORTS)]
    return _checked(
        Ranks(
            rank=_number(environ, "SLURM_PROCID"),
            local_rank=_number(environ, "SLURM_LOCALID"),
            world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
            master_addr=environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
            master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else port,
            launcher="srun",
        )
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environ[name]):
        raise ValueError(f"{name}={environ[name]!r} is not a number that a launcher would set")
    return int(environ[name])


def _checked(ranks: Ranks) -> Ranks:
    if not ranks.local_rank <= ranks.rank < ranks.world_size:
        raise ValueError(
            f"inconsistent ranks from {ranks.launcher}: rank {ranks.rank}, local rank {ranks.local_rank}, "
            f"world size {ranks.world_size}; needed: local rank <= rank < world size"
        )
    return ranks
