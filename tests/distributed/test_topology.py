"""The ranks as one object: its axes, what they do together, and that nothing else asks who this process is."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadit.distributed import ALONE, Axis, Topology, process_group
from megadit.distributed.process_group import take_gpu

ROOT = Path(__file__).parents[2]


def test_a_process_by_itself_needs_no_group() -> None:
    assert (ALONE.rank, ALONE.size, ALONE.data, ALONE.is_first, ALONE.joined) == (0, 1, Axis(0, 1), True, False)
    assert ALONE.sum(torch.tensor(3)).item() == 3
    assert ALONE.on_first(lambda: "x") == "x"
    assert ALONE.on_every(lambda: 7) == [7]


@pytest.mark.parametrize(("num_ranks", "num_replicas"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_axes(run_ranks: Callable[..., list[Any]], num_ranks: int, num_replicas: int) -> None:
    num_shards = num_ranks // num_replicas
    found = run_ranks("topology.py", num_ranks, num_replicas=num_replicas)
    for rank, facts in enumerate(found):
        assert facts["replicate"] == Axis(rank // num_shards, num_replicas)
        assert facts["shard"] == Axis(rank % num_shards, num_shards)
        assert facts["data"] == Axis(rank, num_ranks)  # every rank takes other samples, those of one replica, too
        assert facts["mesh"] == ([num_replicas, num_shards] if num_replicas > 1 else [num_ranks])
        assert facts["place in mesh"] == ([rank // num_shards, rank % num_shards] if num_replicas > 1 else [rank])
        assert facts["sum"] == num_ranks * (num_ranks - 1) / 2
        assert facts["first"] == 0
        assert facts["every"] == list(range(num_ranks))


def test_replicas_must_divide_the_ranks(run_ranks: Callable[..., list[Any]]) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        run_ranks("topology.py", 2, num_replicas=3)
    assert "engine.num_replicas 3 does not divide the 2 ranks" in str(raised.value.exceptions[0])


def test_variables_that_nobody_set_for_this_process_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job's script or an earlier run leaves them: there is no RANK, so nobody else is waited for."""
    monkeypatch.delenv("RANK", raising=False)
    stale = {"WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}
    for name, value in stale.items():
        monkeypatch.setenv(name, value)
    with process_group(needed=False) as topology:
        assert topology == Topology()
        assert not dist.is_initialized()
    with process_group(needed=True, timeout_seconds=10) as topology:
        assert topology == Topology(joined=True)
        assert dist.get_world_size() == 1


@pytest.mark.parametrize(("local_rank", "num_visible", "taken"), [("3", 8, 3), ("3", 1, 0), (None, 8, 0)])
def test_a_rank_takes_its_gpu(
    local_rank: str | None, num_visible: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm and Kubernetes may show each task its own GPU alone, which then is number 0."""
    set_to: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    take_gpu()
    assert set_to == [taken]


def test_more_local_ranks_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2, and 2 GPUs are visible"):
        take_gpu()


VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
QUESTIONS = {"get_rank", "get_world_size"}


def questions(source: str) -> list[str]:
    """Where code asks torch or the environment which rank it is, or writes that down for others."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in QUESTIONS:
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and node.value in VARIABLES:
            found.append(node.value)
    return found


def test_who_we_are_is_asked_in_one_place() -> None:
    asked = {
        str(path.relative_to(ROOT)): questions(path.read_text())
        for top in ("megadit", "eval", "kernels", "launcher")
        for path in sorted((ROOT / top).rglob("*.py"))
    }
    places = {place for place, found in asked.items() if found}
    assert places == {
        "megadit/distributed/process_group.py",
        "launcher/environment.py",
        "launcher/failures.py",  # whether and as which rank a process reports
        "launcher/forked.py",  # starts ranks
        "megadit/benchmarks/train_memory.py",  # as well
    }
    assert questions("dist.get_rank()") == ["get_rank"]
    assert questions("os.environ['WORLD_SIZE']") == ["WORLD_SIZE"]
