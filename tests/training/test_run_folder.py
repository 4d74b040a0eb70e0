"""A start that is killed while it writes the folder of its run leaves one that the next start goes on with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megadit.data.format.manifest import Manifest
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe
from megadit.training import run_folder


@pytest.mark.parametrize("num_written", range(5))
def test_a_start_may_be_killed_between_any_two_files(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_written: int
) -> None:
    recipe, left = tiny_recipe(), [num_written]
    asked = (tmp_path / "run", recipe, build_table(recipe), {0: Manifest.load(recipe.data.url)}, 0)
    write = run_folder.write_text

    def killed(path: Path, text: str) -> None:
        if not left[0]:
            raise InterruptedError
        left[0] -= 1
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_text", killed)
        if num_written < 4:
            with pytest.raises(InterruptedError):
                run_folder.prepare(*asked)
    run_folder.prepare(*asked)
    assert run_folder.load_recipe(tmp_path / "run") == recipe
    assert run_folder.load_manifest(tmp_path / "run") == asked[3][0]
