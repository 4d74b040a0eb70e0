"""Recipes: inheritance, overrides, powers, and errors that name the key, quote the value and say what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st

from megadit.recipe import (
    RECIPE_FOLDER,
    Recipe,
    RecipeError,
    check_world_size,
    differences,
    dump,
    load,
    mark_of,
    parse,
    parse_text,
    resolve,
)

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"family": "mmdit", "input_size": 16, "patch_size": 2, "width": 64, "depth": 2, "head_dim": 32},
    "parametrization": {"base_width": 32},
    "data": {"url": "file:///data/train", "num_streams": 4},
    "optimizer": {"lr": "2^-8"},
    "training": {"num_images": 640, "batch_size": 64},
    "checkpoints": {"every_images": 320},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_extends_merges_sections(base: Path):
    write(base.parent / "child.yaml", "extends: base.yaml\nname: wide\nmodel: {width: 128}\n")
    grandchild = write(base.parent / "grandchild.yaml", "extends: child.yaml\nmodel: {depth: 3}\n")
    recipe = load(grandchild)
    assert (recipe.name, recipe.model.width, recipe.model.depth, recipe.model.head_dim) == ("wide", 128, 3, 32)
    assert load(base).model.width == 64


def test_overrides(base: Path):
    recipe = load(base, ["model.width=96", "optimizer.betas=[0.8, 0.95]", "validation.every_images=64", *VALIDATION])
    assert recipe.model.width == 96
    assert recipe.optimizer.betas == (0.8, 0.95)
    assert recipe.validation is not None


VALIDATION = ["data.validation_url=file:///data/validation"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("2^-10", 2**-10), ("2**-8", 2**-8), ("10^-4", 1e-4), ("1e-4", 1e-4), ("0.001", 0.001), ("2^-7.5", 2**-7.5)],
)
def test_powers(base: Path, text: str, value: float):
    assert load(base, [f"optimizer.lr={text}"]).optimizer.lr == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=64", "unknown key 'model.widht'; did you mean 'width'?"),
        ("zebra=1", "unknown key 'zebra'; known keys: name, imports, seed, model"),
        ("model.width=-1", "model.width = -1: Input should be greater than or equal to 1"),
        ("model.width=wide", "model.width = 'wide': Input should be a valid integer"),
        ("model.width=72", "model: width 72 must be a multiple of head_dim 32"),
        ("model.patch_size=3", "input_size 16 must be a multiple of patch_size 3"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': Input should be a valid number"),
        ("optimizer.lr=.inf", "optimizer.lr = inf"),
        ("engine.kind=ddp", "engine.kind = 'ddp': Input should be 'single', 'fsdp', 'zero1', 'zero2' or 'zero3'"),
        ("engine.num_ranks=2", "engine.kind single runs on one rank, not 2; use another engine.kind"),
        (
            "engine={kind: fsdp, num_ranks: 3}",
            "3 ranks do not divide data.num_streams 4; possible numbers of ranks: [1,",
        ),
        ("data.num_streams=3", "data.num_streams 3 must divide training.batch_size 64"),
        ("training.num_images=100", "num_images 100 must be a multiple of batch_size 64"),
        ("training.micro_batch_size=48", "training.micro_batch_size 48 must divide the 64 samples"),
        ("parametrization.base_width=null", "mup needs exactly one of base_shapes and base_width"),
        ("validation.every_images=64", "validation needs data.validation_url"),
        ("checkpoints=null", "checkpoints = None"),
        (
            "eval={weights: w, tasks: [{task: prompts, sampler: plms}]}",
            "eval.tasks.0.sampler: no sampler 'plms': there are ",
        ),
        ("model.width", "override 'model.width' is not of the form key.sub=value"),
        ("=1", "override '=1' is not of the form key.sub=value"),
        ("name.first=1", "override 'name.first=1': name is a value, not a section"),
        ("model.width=[", "override 'model.width=[': not valid YAML"),
    ],
)
def test_errors_say_what_and_where(base: Path, override: str, message: str):
    with pytest.raises(RecipeError) as error:
        load(base, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=yes", "optimizer.lr = 'yes': Input should be a valid number"),
        ("optimizer.lr=true", "optimizer.lr = True: must be a number"),
        ("optimizer.lr=0^-1", "optimizer.lr = '0^-1': Input should be a valid number"),
        ("training.batch_size=0640", "training.batch_size = '0640': must be a whole number, without zeros before it"),
        ("training.batch_size=1:20", "training.batch_size = '1:20': Input should be a valid integer"),
        ("optimizer.max_grad_norm=no", "; null turns it off"),
        (
            "engine.activation_checkpointing=off",
            "engine.activation_checkpointing = 'off': Input should be 'none', 'selective' or 'full', or Input should",
        ),
        ("imports=[no_such_module]", "imports: cannot import 'no_such_module'"),
    ],
)
def test_what_looks_like_a_number_or_a_switch(base: Path, override: str, message: str):
    """PyYAML has 1.1's booleans, octal and sexagesimal numbers, and pydantic takes a boolean for a number."""
    with pytest.raises(RecipeError) as error:
        load(base, [override])
    assert message in str(error.value)


def test_switches_may_be_yes_and_no(base: Path):
    assert load(base, ["engine={kind: fsdp, compile: yes}"]).engine.compile
    assert load(base, ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\noptimizer: {lr: 1}\nseed: 1\noptimizer: {lr: 2}\n", "'optimizer' is there twice, in lines 2 and 4"),
        ("optimizer:\n  lr: 1\n  lr: 2\n", "'lr' is there twice, in lines 2 and 3"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path / "recipe.yaml", text))


def test_a_file_in_another_encoding_is_named(tmp_path: Path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: not UTF-8: .* at byte 9"):
        load(path)


def test_a_preset_replaces_what_was_stated_before_it_and_no_more(tmp_path: Path):
    write(tmp_path / "parent.yaml", yaml.safe_dump(TREE | {"model": {"preset": "DiT-XL/2", "learn_sigma": False}}))
    child = write(tmp_path / "child.yaml", "extends: parent.yaml\nmodel: {preset: DiT-S/2, depth: 3}\n")
    sizes = {"width": 384, "depth": 3, "head_dim": 64, "learn_sigma": False}
    assert load(child).model.model_dump().items() >= sizes.items()
    large = load(child, ["model.width=64", "model.preset=DiT-B/4", "model.depth=5"]).model
    assert (large.width, large.patch_size, large.depth, large.learn_sigma) == (768, 4, 5, False)


def test_missing_keys_are_named(base: Path):
    tree = {key: value for key, value in TREE.items() if key != "optimizer"}
    with pytest.raises(RecipeError, match="optimizer is missing"):
        parse(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- a", "a recipe is a YAML mapping, not list"),
        ("", "a recipe is a YAML mapping, not NoneType"),
        ("extends: absent.yaml", "no recipe '.*absent.yaml': give the path"),
        ("extends: recipe.yaml", "recipes extend each other in a circle: recipe.yaml -> recipe.yaml"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path / "recipe.yaml", text))


def test_a_text_that_is_no_recipe():
    for text, message in (("", "x: a recipe is a YAML mapping, not NoneType"), ("name: {", "x: not valid YAML")):
        with pytest.raises(RecipeError, match=message):
            parse_text(text, "x")


def test_a_longer_circle(tmp_path: Path):
    write(tmp_path / "a.yaml", "extends: b.yaml")
    write(tmp_path / "b.yaml", "extends: c.yaml")
    write(tmp_path / "c.yaml", "extends: b.yaml")
    with pytest.raises(RecipeError, match=r"b\.yaml: .* circle: a.yaml -> b.yaml -> c.yaml -> b.yaml"):
        load(tmp_path / "a.yaml")


def test_shipped_recipes_are_valid():
    shipped = sorted(RECIPE_FOLDER.glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert resolve(path.stem) == path
        assert isinstance(load(path.stem), Recipe)


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(
        RecipeError, match="no recipe 'quickstat': give the path of a .yaml file or one of .*quickstart"
    ):
        load("quickstat")


def test_recipes_are_frozen(base: Path):
    with pytest.raises(ValueError, match="frozen"):
        load(base).model.width = 1


def test_world_size(base: Path):
    recipe = load(base, ["training.micro_batch_size=16"])
    for world_size in (1, 2, 4):
        check_world_size(recipe, world_size)
    with pytest.raises(ValueError, match="8 ranks do not divide data.num_streams 4"):
        check_world_size(recipe, 8)


def test_differences_and_free_keys(base: Path):
    changed = differences(load(base), load(base, ["model.depth=3", "engine={kind: zero3, num_ranks: 2}"]))
    assert changed == {"model.depth": (2, 3), "engine.kind": ("single", "zero3"), "engine.num_ranks": (1, 2)}
    assert list(changed.free) == ["engine.kind", "engine.num_ranks"]
    assert list(changed.matter) == ["model.depth"]
    assert mark_of("engineering", load(base)) is None


@given(
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    betas=st.tuples(*[st.floats(min_value=0, max_value=1, exclude_max=True)] * 2),
    heads=st.integers(1, 300),
    rates=st.lists(st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True), max_size=3),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])),
    steps=st.integers(1, 10**9),
)
def test_dump_and_parse_are_inverse(seed, lr, betas, heads, rates, name, steps):
    recipe = parse(
        TREE
        | {
            "seed": seed,
            "name": name,
            "optimizer": {"lr": lr, "betas": betas},
            "model": TREE["model"] | {"width": 32 * heads},
            "training": {"batch_size": 64, "num_images": 64 * steps, "ema_rates": rates},
        }
    )
    assert parse_text(dump(recipe), "dumped") == recipe
    assert differences(recipe, recipe) == {}
