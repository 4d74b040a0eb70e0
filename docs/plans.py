"""The tables of docs/planning.md: `make plans` writes them anew, a test of tests/planning holds the page to them."""

import re
from pathlib import Path

from megadit.planning.answers import table_of_recipes
from megadit.planning.costs.published_runs import median_error, table_of_published
from megadit.planning.machine.assumptions import Assumptions

PAGE = Path(__file__).resolve().parent / "planning.md"


def tables() -> dict[str, str]:
    """Name of a table in the page -> its text."""
    assumed = Assumptions()
    errors = [f"{median_error(assumed, left_out):.0%}" for left_out in (False, True)]
    published = f"{table_of_published(assumed)}\n\nMedian of the errors: {errors[0]}; left out: {errors[1]}."
    return {"published": published, "recipes": table_of_recipes()}


def page(text: str) -> str:
    """The page with its tables made anew; each lies between two comments that name it."""
    for name, table in tables().items():
        pattern = rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        text, found = re.subn(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)
        assert found == 1, name
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
