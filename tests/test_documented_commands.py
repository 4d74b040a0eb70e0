"""Every command in the documentation, in the help and in the recipes' comments is one that the command line takes."""

import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import typer

from megadit import cli
from megadit.recipe import RECIPE_FOLDER, load

ROOT = Path(__file__).parents[1]
COMMAND = typer.main.get_command(cli.app)
SHIPPED = {path.stem for path in RECIPE_FOLDER.glob("*.yaml")}
LINE = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:torchrun .*-m -- |srun .*-m |deepspeed .*-m )?megadit (.*)")
INLINE = re.compile(r"`megadit ([^`]+)`")


class Example(NamedTuple):
    where: str
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.where} megadit {' '.join(self.arguments)}"


def pages() -> dict[str, str]:
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *RECIPE_FOLDER.glob("*.yaml")]
    texts = {path.name: path.read_text() for path in paths if path.name != "CHANGELOG.md"}  # which tells of the past
    return texts | {f"help of {' '.join(path) or 'megadit'}": command.help or "" for path, command in commands()}


def commands(command: click.Command = COMMAND, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


def examples() -> Iterator[Example]:
    """Lines of their own, with what a shell would make of them."""
    for where, text in pages().items():
        text = re.sub(r"^(# ?)", "", text, flags=re.MULTILINE) if where.endswith(".yaml") else text
        variables: dict[str, str] = {}
        text = re.sub(r"\\\n\s*", " ", text)  # lines that go on
        for line in text.splitlines():
            if value := re.match(r'([A-Z]+)="(.*)"$', line):
                variables[value[1]] = value[2]
            elif (found := LINE.match(line.strip())) and is_code(line, text, where):
                expanded = re.sub(r"\$([A-Z]+)", lambda name, known=variables: known[name[1]], found[1])
                yield Example(where, shlex.split(expanded, comments=True))


def is_code(line: str, text: str, where: str) -> bool:
    """Not a sentence or an output: pages have commands in fences without a prompt, help and comments indent them."""
    if not where.endswith(".md"):
        return line.startswith("  ")
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return any(line in fence for fence in fences if not fence.startswith("$ "))


EXAMPLES = list(examples())


def resolved(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the first words name, and what is left."""
    command: Any = COMMAND
    rest = list(arguments)
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{' '.join(arguments)!r}: there is no {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    return command, rest


def test_the_examples_are_found() -> None:
    assert len(EXAMPLES) > 60
    assert {example.where for example in EXAMPLES} >= {"README.md", "data.md", "help of train", "dit-mup-search.yaml"}


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_an_example_is_understood(example: Example) -> None:
    """Its command, options and values; and where it names a shipped recipe, the keys that it changes."""
    command, rest = resolved(example.arguments)
    context = command.make_context("megadit", rest)
    if context.params.get("recipe") in SHIPPED:
        load(context.params["recipe"], context.params.get("overrides") or ())


def test_commands_and_options_in_sentences_exist() -> None:
    """`megadit data verify|preview --num` stands for two."""
    for where, text in pages().items():
        for quoted in INLINE.findall(text):
            words = [word.split("=")[0].split("|") for word in quoted.split() if re.match(r"--|\w", word)]
            for arguments in itertools.product(*words):
                command, rest = resolved([word for word in arguments if word != "--help"])
                known = {name for parameter in command.params for name in parameter.opts}
                assert {word for word in rest if word.startswith("--")} <= known, f"{where}: {quoted}"


def test_modules_and_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for where, text in pages().items():
        for module in re.findall(r"python (?:-P )?-m (megadit[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{where}: {module}"
        for target in re.findall(r"`make ([a-z]+)`", text):
            assert target in targets, f"{where}: make {target}"


def test_files_in_the_documentation_exist() -> None:
    """What links name, modules, and folders of the repository; what has capitals or <> stands for something."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    patterns = (r"(?<![\w/.])(?:[a-z_]+/)+[a-z_]+\.py\b", rf"`((?:{folders})/[\w/-]*)`")
    for where, text in pages().items():
        if where.endswith(".md"):
            paths = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
            paths |= {path for pattern in patterns for path in re.findall(pattern, text)}
            for path in paths:
                places = (ROOT, ROOT / "docs", ROOT / "megadit")
                assert any((place / path).exists() for place in places), f"{where}: {path}"
