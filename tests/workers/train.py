"""One rank of a training run."""

from pathlib import Path

from megadit.interop.starting_weights import source_of
from megadit.recipe import Recipe
from megadit.training import trainer


def main(recipe: Recipe, run: Path, resume: str = "auto", place: str | None = None, kind: str | None = None) -> int:
    """`place` and `kind`: of weights to start from."""
    return trainer.train(recipe, run, resume=resume, source=None if place is None else source_of(place, kind))
