"""One rank of a training run that looks at itself after every step."""

from pathlib import Path

import psutil
from torch.optim.optimizer import register_optimizer_step_post_hook

from megadit.recipe import Recipe
from megadit.training import trainer


def main(recipe: Recipe, run: Path) -> list[tuple[int, int, int]]:
    """Resident bytes, open files and sockets, and threads after each step."""
    process, found = psutil.Process(), []

    def look(*_: object) -> None:
        found.append((process.memory_info().rss, process.num_fds(), process.num_threads()))

    handle = register_optimizer_step_post_hook(look)
    trainer.train(recipe, run)
    handle.remove()
    return found
