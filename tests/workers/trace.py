"""A process that traces one recipe after another."""

from megadit.planning.trace import Traced, trace_here
from megadit.recipe import Recipe


def main(jobs: list[tuple[Recipe, int, int]]) -> list[Traced]:
    """Of each (recipe, number of ranks, tokens of captions)."""
    return [trace_here(*job) for job in jobs]
