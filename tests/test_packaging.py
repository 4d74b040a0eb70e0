"""A wheel and an editable install both give `megadit.kernels`, never a bare `kernels`, from any working directory."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = ("eval", "kernels", "launcher", "recipes", "shapes")
NOT_SOURCE = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests")

CHECK = """
import importlib, sys
from importlib.resources import files
for name in {folders}:
    module = importlib.import_module("megadit." + name)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit("a bare import finds " + name)
import megadit.recipe, megadit.data
assert megadit.recipe.load("quickstart").name == "quickstart"
for package, pattern in (("recipes", "*.yaml"), ("shapes", "*.bsh"), ("data", "assets/*.zip"), ("data", "assets/*.md")):
    assert list(files("megadit." + package).glob(pattern)), (package, pattern)
assert files("megadit").joinpath("py.typed").is_file()
print(megadit.__file__)
"""


def python(environment: Path, *arguments: str, cwd: Path) -> str:
    # The copy of the caller's variables is without those that would put something on sys.path.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [str(environment / "bin" / "python"), *arguments]
    result = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building must not write into the checkout that the other tests run from."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "megadit-source", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("megadit-*.whl")
    return built


def pip(interpreter: str, command: str, *arguments: str) -> None:
    call = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter, command, "--quiet"]
    result = subprocess.run([*call, "--no-deps", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with megadit installed; its dependencies are those of the running one."""
    environment = tmp_path_factory.mktemp(request.param) / "venv"
    venv.create(environment)
    # A path in a .pth file makes packages importable without running the .pth files there, so the installation
    # that the tests run from stays out.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    interpreter = str(environment / "bin" / "python")
    if request.param == "wheel":
        pip(interpreter, "install", str(request.getfixturevalue("wheel")))
    else:
        pip(interpreter, "install", "--no-build-isolation", "--editable", str(source))
    return environment


def test_imports_and_package_data(installed: Path, source: Path, tmp_path: Path):
    editable = installed.parent.name.startswith("editable")
    for folder in (tmp_path, Path("/"), source / "docs"):
        found = Path(python(installed, "-c", CHECK.format(folders=FOLDERS), cwd=folder).strip())
        assert found.is_relative_to(source if editable else installed)


def test_command_from_another_directory(installed: Path, tmp_path: Path):
    command = str(installed / "bin" / "megadit")
    assert "Usage: megadit" in python(installed, command, "--help", cwd=tmp_path)
    assert "quickstart" in python(installed, command, "recipe", "list", cwd=tmp_path).split()
    assert "Usage: " in python(installed, "-P", "-m", "megadit", "--help", cwd=ROOT)


def test_wheel_contents(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (message_from_bytes(archive.read(name)) for name in names if name.endswith("/METADATA"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megadit"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert metadata["License-Expression"] == "MIT" or metadata["License"] == "MIT"
    requirements = {Requirement(text).name: Requirement(text) for text in metadata.get_all("Requires-Dist")}
    assert "torchvision" not in requirements
    assert [version in requirements["torch"].specifier for version in ("2.10.0", "2.11.0", "2.13.0", "2.14.0")] == [
        False,
        True,
        True,
        False,
    ]


def test_locked_versions_are_what_setup_asks_for(wheel: Path):
    lines = [line for name in ("torch", "lock", "tools") for line in requirement_lines(f"{name}.txt")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    locked = {canonical(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert "torchvision" not in locked
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (message_from_bytes(archive.read(n)) for n in archive.namelist() if n.endswith("/METADATA"))
    for text in metadata.get_all("Requires-Dist"):
        requirement = Requirement(text)
        name = canonical(requirement.name)
        if requirement.marker is None or name in locked:
            assert locked[name] in requirement.specifier, text


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
