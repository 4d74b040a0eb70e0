"""One rank that was started with a recipe of its own."""

import os
from pathlib import Path

from megadit.recipe import Recipe
from megadit.training import trainer


def main(recipes: list[Recipe], run: Path) -> int:
    return trainer.train(recipes[int(os.environ["RANK"])], run)
