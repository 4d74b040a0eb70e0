"""Launchers tell each process who it is in variables of their own; a mistake there must not become a wrong rank."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megadit.launcher.environment import Ranks, detect, export, first_host

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "99",  # of the job, not of this step
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
}


def test_nobody():
    ranks = detect({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "WORLD_SIZE": "2"})
    assert ranks == Ranks(rank=0, local_rank=0, world_size=1, launcher="nobody")
    assert not ranks.launched


def test_torchrun_and_deepspeed():
    ranks = Ranks(3, 1, 4, "h", 29500, "deepspeed")
    assert detect(TORCHRUN) == ranks
    assert detect(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"
    # torchrun below srun: torchrun's word counts
    assert detect(SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}).rank == 3


def test_srun():
    ranks = detect(SRUN)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.launcher) == (9, 1, 16, "srun")
    assert ranks.master_addr == "gpu007"
    other_rank = detect(SRUN | {"SLURM_PROCID": "10", "SLURM_LOCALID": "2"})
    other_step = detect(SRUN | {"SLURM_STEP_ID": "3"})
    assert other_rank.master_port == ranks.master_port != other_step.master_port
    chosen = detect(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (chosen.master_addr, chosen.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("login1", "login1"),
        ("a1,b2", "a1"),
        ("gpu[007-012,20]-ib,login1", "gpu007-ib"),
        ("r[1-2]n[3,5]", "r1n3"),
        ("node[5]", "node5"),
    ],
)
def test_first_host(nodelist: str, host: str):
    assert first_host(nodelist) == host
    if shutil.which("scontrol"):
        told = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=False)
        if told.returncode == 0:  # without a configuration it expands nothing
            assert told.stdout.split()[0] == host


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "but not LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "4"}, "rank 4, local rank 1, world size 4"),
        (TORCHRUN | {"LOCAL_RANK": "5"}, "local rank 5"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1'"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS=''"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE='four'"),
        (SRUN | {"SLURM_PROCID": "16"}, "inconsistent ranks from srun"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "names no host"),
    ],
)
def test_contradictions_are_errors(environ: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        detect(environ)


def test_export_is_read_back():
    environ: dict[str, str] = {}
    export(detect(SRUN), environ)
    again = detect(environ)
    assert (again.rank, again.local_rank, again.world_size) == (9, 1, 16)
    assert again.master_addr == "gpu007"


def test_real_torchrun(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("from megadit.launcher.environment import detect; print(detect())")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = sorted(line for line in result.stdout.splitlines() if line.startswith("Ranks("))
    assert len(lines) == 2
    assert all(f"Ranks(rank={r}, local_rank={r}, world_size=2, " in lines[r] for r in (0, 1))
    assert all("launcher='torchrun'" in line for line in lines)


@pytest.mark.slow
def test_real_deepspeed_launcher(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("from megadit.launcher.environment import detect; print(detect(), flush=True)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [str(launcher), "--num_accelerators", "2", "--master_port", str(port), str(script)]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, check=True)
    lines = sorted(line for line in result.stdout.splitlines() if line.startswith("Ranks("))
    assert len(lines) == 2
    assert all(f"Ranks(rank={r}, local_rank={r}, world_size=2, " in lines[r] for r in (0, 1))
    assert all("launcher='deepspeed'" in line for line in lines)
