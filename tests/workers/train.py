"""One rank of a training run."""

from pathlib import Path

from megadit.recipe import Recipe
from megadit.training import trainer


def main(recipe: Recipe, run: Path, resume: str = "auto") -> int:
    return trainer.train(recipe, run, resume=resume)
