"""The recipes and base shapes that ship: they load, and say what the papers say."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megadit.parametrization import base_shapes
from megadit.parametrization.groups import param_groups
from megadit.parametrization.table import build_table
from megadit.recipe import RECIPE_FOLDER, all_presets, load

SHIPPED = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))
LARGE = [name for name in SHIPPED if f"{name}-cpu" in SHIPPED]


def num_parameters(name: str, *overrides: str) -> int:
    return sum(math.prod(spec.shape) for spec in build_table(load(name, overrides)))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_has_a_whole_table(name: str) -> None:
    recipe = load(name)
    specs = build_table(recipe)
    assert recipe.name == name
    model = base_shapes.meta_model(recipe.model)
    assert [spec.name for spec in specs] == [n for n, p in model.named_parameters() if p.requires_grad]
    num_rates = 1 if recipe.parametrization.kind == "sp" or base_sized(name) else 2
    assert len({spec.hyperparameters["lr"] for spec in specs}) == num_rates


def base_sized(name: str) -> bool:
    """Whether the recipe's model is the base model itself."""
    return all(spec.width_mult == 1 for spec in build_table(load(name)))


def test_every_recipe_of_the_paper_has_a_twin_for_a_cpu() -> None:
    twins = {"dit-mup-search", "dit-xl2-mup", "dit-xl2-sp", "pixart-mup-proxy", "pixart-mup", "pixart-sp"}
    assert twins | {"mmdit-mup-proxy", "mmdit-18b"} == set(LARGE)
    for name in LARGE:
        large, small = load(name), load(f"{name}-cpu")
        assert (large.model.family, large.objective.kind) == (small.model.family, small.objective.kind)
        assert large.parametrization.kind == small.parametrization.kind
        assert num_parameters(f"{name}-cpu") < 5_000_000


# Millions of parameters: arXiv 2212.09748, table 4 (DiT); arXiv 2505.15270 (PixArt, MMDiT).
PUBLISHED = [
    *(("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675), ("DiT-XL/8", 676)),
    *(("DiT-muP-1152", 675), ("PixArt-288", 40), ("PixArt-1152", 610), ("MMDiT-512", 180), ("MMDiT-5120", 18_000)),
]


@pytest.mark.parametrize(("preset", "millions"), PUBLISHED)
def test_presets_have_the_published_size(preset: str, millions: int) -> None:
    recipe = {"DiT": "dit-xl2-sp", "PixArt": "pixart-sp", "MMDiT": "mmdit-18b"}[preset.split("-")[0]]
    sp = ["parametrization.kind=sp", "parametrization.base_shapes=null"]
    assert num_parameters(recipe, f"model.preset={preset}", *sp) / 1e6 == pytest.approx(millions, rel=0.03)


def test_every_preset_is_a_model() -> None:
    sp = ["parametrization.kind=sp", "parametrization.base_shapes=null"]
    for preset, settings in all_presets().items():
        recipe = {"dit": "dit-xl2-sp", "pixart": "pixart-sp", "mmdit": "mmdit-18b"}[settings["family"]]
        assert load(recipe, [f"model.preset={preset}", *sp]).model.width == settings["width"]


@pytest.mark.parametrize(
    ("file", "recipe", "num_names", "width", "delta"),
    [
        ("dit_d28_hd72_w288.bsh", "dit-mup-search", 291, 288, 360),
        ("pixart_d28_hd72_w288.bsh", "pixart-mup-proxy", 435, 288, 360),
        ("mmdit_d19_hd128_w512.bsh", "mmdit-mup-proxy", 472, 512, 640),
    ],
)
def test_shipped_shapes(tmp_path: Path, file: str, recipe: str, num_names: int, width: int, delta: int) -> None:
    """They are what `megadit shapes make` writes, and what two models of base and delta width give."""
    from_width = ["parametrization.base_shapes=null", f"parametrization.base_width={width}"]
    base_shapes.make(load(recipe, from_width), tmp_path / "made.bsh")
    assert (tmp_path / "made.bsh").read_text() == base_shapes.resolve(file).read_text()
    config = load(recipe).model
    models = [base_shapes.meta_model(base_shapes.at_width(config, w)) for w in (width, delta)]
    shapes = base_shapes.load(base_shapes.resolve(file))
    assert shapes == base_shapes.compare(*models)
    assert len(shapes) == num_names


def test_published_shapes_of_dit_name_its_positions_too(tmp_path: Path) -> None:
    """There they are a parameter that is not trained (292 names); ours are a buffer."""
    text = base_shapes.resolve("dit_d28_hd72_w288.bsh").read_text()
    (tmp_path / "published.bsh").write_text(text + "pos_embed:\n- null\n- null\n- 288\n")
    recipe = load("dit-xl2-mup", [f"parametrization.base_shapes={tmp_path / 'published.bsh'}"])
    assert build_table(recipe) == build_table(load("dit-xl2-mup"))


def test_hyperparameters_of_the_paper() -> None:
    """arXiv 2505.15270 and its official configurations."""
    dit, sp, proxy, target, pixart_sp = map(
        load, ("dit-xl2-mup", "dit-xl2-sp", "pixart-mup-proxy", "pixart-mup", "pixart-sp")
    )
    assert (dit.optimizer.lr, dit.training.batch_size, dit.num_steps) == (2**-10, 256, 2_400_000)
    assert (dit.training.ema_rates, dit.optimizer.schedule, dit.optimizer.max_grad_norm) == (
        (0.9999,),
        "constant",
        None,
    )
    assert (sp.optimizer.lr, sp.parametrization.kind) == (1e-4, "sp")
    assert (proxy.training.batch_size, proxy.num_steps, proxy.model.width) == (1408, 39_185, 288)
    assert (target.training.batch_size, target.num_steps, target.model.width) == (5632, 58_770, 1152)
    assert proxy.optimizer.lr == target.optimizer.lr == 2**-10
    assert pixart_sp.optimizer.lr == pytest.approx(2e-5 * math.sqrt(5632 / 256), rel=1e-3)
    assert (target.optimizer.weight_decay, target.optimizer.eps, target.optimizer.max_grad_norm) == (0.03, 1e-10, 0.01)
    assert load("mmdit-18b").num_steps == 200_000
    assert load("mmdit-mup-proxy").num_steps == 30_000


def test_18b_is_shown_in_seconds_without_its_memory(tmp_path: Path) -> None:
    """2 GB of data at most, and of all that is in memory. (A child's ru_maxrss begins with that of its parent.)"""
    script = f"""if True:
        import resource, runpy, sys
        resource.setrlimit(resource.RLIMIT_DATA, ({2 * 10**9},) * 2)
        sys.argv = ["megadit", "recipe", "show", "mmdit-18b"]
        try:
            runpy.run_module("megadit", run_name="__main__")
        finally:
            sys.stderr.write(open("/proc/self/status").read())
    """
    command = [sys.executable, "-P", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    (most_kb,) = re.findall(r"^VmHWM:\s+(\d+) kB$", result.stderr, re.MULTILINE)
    assert int(most_kb) < 2e6
    assert result.stdout.rstrip().endswith("472 tensors, 17,797,919,040 parameters (17.8B)")


def test_18b_has_two_classes_of_learning_rates_for_matrices() -> None:
    specs = build_table(load("mmdit-18b"))
    groups = {group.hyperparameters["lr"]: group.names for group in param_groups(specs)}
    assert sorted(groups) == [2**-12 / 10, 2**-12]
    roles = {lr: {spec.role for spec in specs if spec.name in names} for lr, names in groups.items()}
    assert roles == {2**-12 / 10: {"hidden"}, 2**-12: {"input", "output", "vector"}}
    assert sum(len(names) for names in groups.values()) == len(specs)
