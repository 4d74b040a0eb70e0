"""The layers of the package, who imports whom, and a picture of it: `make layers` writes docs/images/layers.svg.

`LAYERS` is the one place that says which room may import which. tests/test_layers.py holds the code to it, and the
picture to the code.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "layers.svg"

LAYERS = (
    ("cli",),
    ("quickstart",),
    ("benchmarks",),
    ("eval",),
    ("interop", "tuning"),
    ("launcher",),
    ("sampling",),
    ("training",),
    ("planning",),
    ("engines",),
    ("data",),
    ("distributed",),
    ("parametrization",),
    ("recipe",),
    ("objectives", "optimizers"),
    ("models",),
    ("kernels",),
    ("root",),
)
"""From top to bottom: a room imports from itself and from lower lines; the rooms of one line do not know each other.

A room is a folder; `root` are the modules that lie in megadit/ itself, but for `quickstart`, which has a line, and
`__main__`, which is the command line's. An import inside a function counts like any other.
"""
LEVEL = {room: len(LAYERS) - line for line, rooms in enumerate(LAYERS) for room in rooms}  # the lowest is 1

Modules = Mapping[str, Path]  # the files of the package by the names under which they are imported
Imports = Mapping[str, frozenset[str]]  # a module -> the modules that it imports


def modules() -> dict[str, Path]:
    """All modules of the package; setup.py maps top-level folders into it."""
    found = {}
    for folder in ("megadit", "eval", "kernels", "launcher"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts if folder == "megadit" else ("megadit", *parts))] = path
    return found


def room_of(module: str) -> str:
    """The room of a module; of a folder that has no line in LAYERS, its name."""
    parts = module.split(".")
    if module == "megadit.__main__":
        return "cli"
    is_room = len(parts) > 2 or (len(parts) == 2 and (parts[1] in LEVEL or (ROOT / "megadit" / parts[1]).is_dir()))
    return parts[1] if is_room else "root"


def imports(files: Modules) -> dict[str, frozenset[str]]:
    """What each module imports of the package, inside functions and for type checkers, too."""
    return {
        name: frozenset(_imported(path.read_text(encoding="utf-8"), files) - {name}) for name, path in files.items()
    }


def _imported(source: str, files: Modules) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in files else node.module for name in inside]
        else:
            continue
        found.update(name for name in names if name in files)
    return found


def upward(graph: Imports) -> list[str]:
    """The imports that LAYERS forbids, as "MODULE imports MODULE"."""
    return [
        f"{module} imports {imported}"
        for module, all_imported in sorted(graph.items())
        for imported in sorted(all_imported)
        if room_of(module) != room_of(imported) and LEVEL[room_of(module)] <= LEVEL[room_of(imported)]
    ]


def circle(graph: Imports) -> list[str]:
    """Modules that import each other in a ring, the first of them again at the end; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                if ring := walk(imported, [*path, module]):
                    return ring
            done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := walk(module, []))), [])


CELL, LEFT, TOP = 34, 150, 140  # pixels; the names of rows are left of the cells, those of columns above
SAME, IMPORTS, ALLOWED, FORBIDDEN = "#4a4a4a", "#5b9bd0", "#ffffff", "#ececec"


def draw(graph: Imports) -> str:
    """The picture as SVG: rows of rooms import from the columns that are blue. Grey cells are above a room's line."""
    rooms = [room for line in LAYERS for room in line]
    pairs = {(room_of(module), room_of(imported)) for module, found in graph.items() for imported in found}
    width, height = LEFT + CELL * len(rooms) + 20, TOP + CELL * len(rooms) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row, room in enumerate(rooms):
        middle = row * CELL + CELL // 2
        level = f'<tspan fill="#8a8a8a" font-size="11">{LEVEL[room]}&#160;&#160;</tspan>'
        parts.append(f'<text x="{LEFT - 10}" y="{TOP + middle + 5}" text-anchor="end">{level}{room}</text>')
        x, y = LEFT + middle + 5, TOP - 10
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-60 {x} {y})">{room}</text>')
        for column, other in enumerate(rooms):
            allowed = LEVEL[room] > LEVEL[other]
            fill = SAME if row == column else IMPORTS if (room, other) in pairs else ALLOWED if allowed else FORBIDDEN
            x, y = LEFT + column * CELL, TOP + row * CELL
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="#d0d0d0"/>')
    legend = "A row imports from the columns that are blue. Grey must stay grey: imports run downwards."
    parts.append(f'<text x="20" y="{height - 22}" font-size="12" fill="#555555">{legend}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(imports(modules())), encoding="utf-8")
