"""Local ranks really started: what they print, how they fail, how signals reach them. The ranks are small scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DRIVER = "import sys; from megadit.launcher.local import launch; sys.exit(launch(2, sys.argv[1:]))"

ALL_REDUCE = """
import torch.distributed as dist, torch
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
line = f"rank {dist.get_rank()} of {dist.get_world_size()}: {total.item()}\\n"
print(line, end="", flush=True)  # one write: the ranks share a pipe
dist.barrier()
dist.destroy_process_group()
"""

# Works until a signal, takes its time to write a checkpoint, and exits with 75: what the trainer does.
STOPPABLE = """
import os, signal, sys, time
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(number))
print(f"ready {os.getpid()}\\n", end="", flush=True)  # one write: the ranks share a pipe
while not stop:
    time.sleep(0.02)
time.sleep(0.5 * (1 + int(os.environ["RANK"])))
with open(f"checkpoint-{os.environ['RANK']}", "w") as file:
    file.write(signal.Signals(stop[0]).name)
os._exit(75)
"""

STUBBORN = """
import os, signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print(f"ready {os.getpid()}\\n", end="", flush=True)  # one write: the ranks share a pipe
time.sleep(600)
"""


def failing(body: str) -> str:
    """A rank that joins the others and runs `body` on rank 1 while rank 0 waits in a collective."""
    return f"""
import os, torch, torch.distributed as dist
from megadit.launcher.failures import run_reporting
def work():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        {body}
    dist.all_reduce(torch.zeros(1))
run_reporting(work)
"""


@pytest.fixture
def start(tmp_path: Path):
    started = []

    def start(script: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
        (tmp_path / "rank.py").write_text(script)
        unset = {"RANK", "OMP_NUM_THREADS", "MEGADIT_TRACEBACK"}
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, "rank.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k not in unset} | (environ or {}),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(2)]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_ranks_find_each_other(start):
    process = start(ALL_REDUCE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ["rank 0 of 2: 3", "rank 1 of 2: 3"]
    assert err == ""


def test_environment_of_ranks(start):
    names = ("OMP_NUM_THREADS", "PYTHONSAFEPATH", "MASTER_ADDR", "LOCAL_RANK", "GLOO_SOCKET_IFNAME")
    script = f"import os; print(*[os.environ[n] for n in {names}])"
    out, _ = start(script).communicate(timeout=60)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(out.splitlines()) == [f"{threads} 1 127.0.0.1 0 lo", f"{threads} 1 127.0.0.1 1 lo"]


def test_what_the_user_has_set_wins(start):
    script = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['GLOO_SOCKET_IFNAME'])"
    out, _ = start(script, {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth7"}).communicate(timeout=60)
    assert out.splitlines() == ["7 eth7"] * 2


def test_an_expected_error_is_one_line(start):
    process = start(failing("raise ValueError('bucket x\\n is missing')"))
    _, err = process.communicate(timeout=60)
    assert errors(err) == ["megadit: error: rank 1: bucket x is missing"]
    assert process.returncode == 1


def test_an_error_of_all_ranks_is_said_once(start):
    script = """
from megadit.launcher.failures import run_reporting
def work():
    raise OSError("no space left")
run_reporting(work)
"""
    process = start(script)
    _, err = process.communicate(timeout=60)
    assert len(errors(err)) == 1
    assert err.endswith("no space left\n")
    assert process.returncode == 1


def test_an_unexpected_error_keeps_its_traceback(start):
    process = start(failing("{}['lost']"))
    _, err = process.communicate(timeout=60)
    assert "KeyError: 'lost'" in err
    assert err.count("Traceback") == 1  # the rank that lost its peer adds none
    assert errors(err)[-1] == "megadit: error: rank 1: KeyError: 'lost' (its traceback is above)"
    assert process.returncode == 1


def test_a_killed_rank_is_named(start):
    process = start(failing("os.kill(os.getpid(), 9)"))
    _, err = process.communicate(timeout=60)
    assert len(errors(err)) == 1
    assert "rank 1: killed by SIGKILL" in err
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("sent", "received"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGTERM")]
)
def test_signals_reach_the_ranks(start, tmp_path: Path, sent: signal.Signals, received: str):
    process = start(STOPPABLE)
    wait_until_ready(process)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == ""
    assert [(tmp_path / f"checkpoint-{rank}").read_text() for rank in (0, 1)] == [received] * 2


def test_a_second_interrupt_kills(start):
    process = start(STUBBORN)
    ranks = wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert all(psutil.pid_exists(rank) for rank in ranks)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed by SIGKILL" in err
    assert not any(psutil.pid_exists(rank) for rank in ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_ranks_stop_when_their_launcher_is_killed(start, tmp_path: Path):
    process = start("from megadit.launcher.processes import follow_parent; follow_parent()\n" + STOPPABLE)
    ranks = [psutil.Process(pid) for pid in wait_until_ready(process)]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert [(tmp_path / f"checkpoint-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2
