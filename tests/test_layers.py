"""Imports run downwards and in no ring; what a family or an objective is, only its own folder asks."""

import ast
import importlib.util
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

from megadit.models import FAMILIES
from megadit.objectives import OBJECTIVES
from megadit.optimizers import OPTIMIZERS

PATH = Path(__file__).parents[1] / "docs" / "layers.py"
_spec = importlib.util.spec_from_file_location("layers", PATH)
layers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layers)

MODULES = layers.modules()
IMPORTS = layers.imports(MODULES)


def test_every_folder_has_a_line() -> None:
    assert {layers.room_of(module) for module in MODULES} <= layers.LEVEL.keys()
    assert len(layers.LEVEL) == sum(map(len, layers.LAYERS))  # and only one


def test_imports_run_downwards() -> None:
    assert layers.upward(IMPORTS) == []


def test_no_modules_import_each_other() -> None:
    assert layers.circle(IMPORTS) == []


def test_the_picture_is_up_to_date() -> None:
    assert layers.PICTURE.read_text() == layers.draw(IMPORTS), "run `make layers`"


def test_planted_imports_are_found(tmp_path: Path) -> None:
    """Inside a function, for a type checker, of a sibling, of a name that is a module; and a ring of three."""
    sources = {
        "megadit.node": "def f():\n    from megadit.training import trainer\n",
        "megadit.kernels.gelu": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megadit.models.dit\n",
        "megadit.optimizers.adamw": "from megadit.objectives.flow import Flow\n",
        "megadit.objectives.flow": "from megadit.models import dit\n",
        "megadit.models.dit": "import torch\nfrom megadit import node\n",
        "megadit.training.trainer": "from megadit.kernels.gelu import gelu\n",
    }
    files = {}
    for module, source in sources.items():
        files[module] = tmp_path / f"{module}.py"
        files[module].write_text(source)
    graph = layers.imports(files)
    assert layers.upward(graph) == [
        "megadit.kernels.gelu imports megadit.models.dit",
        "megadit.node imports megadit.training.trainer",
        "megadit.optimizers.adamw imports megadit.objectives.flow",
    ]
    ring = layers.circle(graph)
    assert ring[0] == ring[-1]
    assert set(ring) == {
        "megadit.kernels.gelu",
        "megadit.models.dit",
        "megadit.node",
        "megadit.training.trainer",
    }


# What only the owner of a choice may ask: its values, and the classes of its settings and of what they build.
OWNERS = {"family": "models", "objective": "objectives", "optimizer": "optimizers"}
SHARED = ("megadit.models.layers", "megadit.models.rules")  # parts that all families are built of


def owned_classes() -> set[str]:
    """Classes of models, objectives, optimizers and their settings."""
    owned = set()
    for module, path in MODULES.items():
        if layers.room_of(module) in OWNERS.values() and module not in SHARED:
            owned |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}
    return owned


def owned_values() -> set[str]:
    return {*FAMILIES.names, *OBJECTIVES.names, *OPTIMIZERS.names}


def questions(source: str, classes: Set[str], values: Set[str]) -> Iterator[str]:
    """Where `source` asks which family, objective or optimizer there is, as "LINE: code"."""
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [operand for operand in (node.left, *node.comparators) if is_choice(operand, values)]
        elif isinstance(node, ast.Match):
            patterns = [pattern for case in node.cases for pattern in ast.walk(case.pattern)]
            named = [p.cls for p in patterns if isinstance(p, ast.MatchClass) and names(p.cls) & classes]
            constants = [p.value for p in patterns if isinstance(p, ast.MatchValue) and is_choice(p.value, values)]
            asked = [*named, *constants, *([node.subject] if is_choice(node.subject, values) else [])]
        elif isinstance(node, ast.Call) and names(node.func) & {"isinstance", "issubclass"}:
            asked = [node] if any(names(argument) & classes for argument in node.args[1:]) else []
        elif isinstance(node, ast.Dict | ast.Subscript):
            keys = node.keys if isinstance(node, ast.Dict) else [node.slice]
            asked = [key for key in keys if key is not None and is_choice(key, values)]
        for found in asked[:1]:
            yield f"{found.lineno}: {ast.unparse(node).splitlines()[0]}"


def is_choice(node: ast.expr, values: Set[str]) -> bool:
    """Whether an expression is a family's name, or the kind of an objective or an optimizer, or a list of them."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(is_choice(element, values) for element in node.elts)
    if isinstance(node, ast.Constant):
        return node.value in values
    if isinstance(node, ast.Attribute) and node.attr == "kind":
        return bool(names(node.value) & OWNERS.keys())
    return getattr(node, "attr", getattr(node, "id", None)) == "family"


def names(node: ast.AST) -> set[str]:
    """The names and the last parts of dotted names in an expression."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def test_nobody_asks_which_family_or_objective_there_is() -> None:
    classes, values = owned_classes(), owned_values()
    found = [
        f"{module}:{question}"
        for module, path in MODULES.items()
        if layers.room_of(module) not in OWNERS.values()
        for question in questions(path.read_text(), classes, values)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "if config.family == 'anything': pass",
        "if recipe.model.family in known: pass",
        "x = 1 if 'dit' != name else 2",
        "match model.family:\n    case _: pass",
        "match config:\n    case DiTModel(): pass",
        "match name:\n    case 'mmdit': pass",
        "isinstance(config, schema.DiTModel)",
        "isinstance(config, int | DiTModel)",
        "issubclass(kind, (DiTModel, str))",
        "if recipe.objective.kind == other: pass",
        "if optimizer.kind is None: pass",
        "sizes = {'dit': 1}[name]",
        "sizes = by_name['dit']",
    ],
)
def test_planted_questions_are_found(source: str) -> None:
    assert len(list(questions(source, {"DiTModel"}, {"dit", "mmdit"}))) == 1


@pytest.mark.parametrize("source", ["family_of(config).build(config)", "engine.kind == 'fsdp'", "isinstance(x, int)"])
def test_what_is_no_question_passes(source: str) -> None:
    assert not list(questions(source, {"DiTModel"}, {"dit", "mmdit"}))
