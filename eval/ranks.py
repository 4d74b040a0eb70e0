"""One command line, one process or several: what the commands of evaluation share. torch is imported inside."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from megadit.exit_codes import DONE
from megadit.launcher.environment import Ranks
from megadit.launcher.join import launch_or_join

if TYPE_CHECKING:
    from megadit.distributed import Topology

TIMEOUT_SECONDS = 24 * 3600  # ranks wait for the slowest one's share


def run_on_ranks(num_ranks: int, job: Callable[["Topology"], None]) -> int:
    """Call `job` on each of the ranks that this process is one of, or starts; returns the exit code."""

    def join(_: Ranks) -> int:
        from megadit.distributed import process_group

        with process_group(needed=False, timeout_seconds=TIMEOUT_SECONDS) as topology:
            job(topology)
        return DONE

    return launch_or_join(num_ranks, join)
