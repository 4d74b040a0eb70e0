"""A name has one meaning: no two files of the package, and no two classes, share one without a stated reason."""

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_FILES = 16  # of a folder, beside its __init__.py

FAMILY = "what every family says of itself"
SAME_FILES = {
    "config.py": FAMILY,
    "diffusers.py": f"{FAMILY}; in interop, what is done with it",
    "initialisation.py": f"{FAMILY}; in parametrization, what is done with it",
    "model.py": FAMILY,
    "loading.py": "of a recipe, of a checkpoint: from its file",
    "pack.py": "what a rank packs; in launcher, the ranks",
    "quickstart.py": "of training, of evaluation: one command after the other",
}
SAME_CLASSES = {
    "Block": FAMILY,
    "FinalLayer": FAMILY,
    "Engine": "the section of a recipe, and what it builds",
}


def sources() -> list[Path]:
    return [path for top in ("megadit", "eval", "kernels", "launcher") for path in sorted((ROOT / top).rglob("*.py"))]


def shared(named: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, path in named:
        places[name].append(str(path.relative_to(ROOT)))
    return {name: found for name, found in places.items() if len(found) > 1}


def test_files_of_one_name_have_one_meaning() -> None:
    found = shared((path.name, path) for path in sources() if path.name != "__init__.py")
    assert found.keys() == SAME_FILES.keys(), found


def test_classes_of_one_name_have_one_meaning() -> None:
    classes = [
        (node.name, path)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    found = shared(classes)
    assert found.keys() == SAME_CLASSES.keys(), found


def test_folders_are_small_and_say_what_they_hold() -> None:
    for folder in {path.parent for path in sources()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES + 1, folder
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
