"""How a command becomes ranks: it starts local ones of itself, or is one of those that somebody started."""

import sys
from collections.abc import Callable, Sequence

from megadit.launcher.environment import Ranks, detect, export
from megadit.launcher.local import launch
from megadit.launcher.processes import follow_parent


def launch_or_join(num_ranks: int, work: Callable[[Ranks], int], arguments: Sequence[str] | None = None) -> int:
    """The exit code of `work` as one of the ranks, or of `num_ranks` local ranks where nobody has started this process.

    `arguments` are the command line of the ranks, after `megadit`; by default they get that of this process. Raises
    ValueError for an environment that contradicts itself.
    """
    follow_parent()
    ranks = detect()
    if not ranks.launched and num_ranks > 1:
        return launch(num_ranks, ["-m", "megadit", *(sys.argv[1:] if arguments is None else arguments)])
    if ranks.launched:
        export(ranks)
    return work(ranks)
