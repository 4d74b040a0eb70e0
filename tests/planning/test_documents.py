"""The tables of docs/planning.md are what the planner says today."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    """`make plans` writes it."""
    text = (DOCS / "planning.md").read_text()
    assert runpy.run_path(str(DOCS / "plans.py"))["page"](text) == text
