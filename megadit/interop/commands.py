"""What `megadit interop` does: a published checkpoint becomes a model folder, a model becomes a folder of diffusers.

A model folder has recipe.yaml and model.safetensors: the weights in our names, fp32, without readout multipliers,
which follow from the recipe.
"""

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from megadit import models, recipe as recipes
from megadit.files import write_text
from megadit.interop.diffusers import export
from megadit.interop.published import Kind, load_published, read_published
from megadit.interop.strict import load_strictly
from megadit.models.layers import Readout
from megadit.parametrization.initialisation import set_multipliers
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe
from megadit.sampling.generate import load_model
from megadit.training import run_folder

WEIGHTS = "model.safetensors"


def load_published_command(
    recipe_name: str, checkpoint: Path, out: Path, overrides: Iterable[str] = (), prefer: Kind = "ema"
) -> None:
    """Write a published checkpoint of DiT or PixArt-alpha as a model folder.

    Raises ValueError where the checkpoint is not one of the recipe's model.
    """
    recipe = recipes.load(recipe_name, overrides)
    if not models.family_of(recipe.model).has_published:
        known = [name for name in models.FAMILIES.names if models.FAMILIES.get(name).has_published]
        raise ValueError(
            f"there are no published checkpoints of model.family {recipe.model.family}: "
            f"the recipe must have one of {', '.join(known)}"
        )
    model = models.build(recipe.model)
    load_published(model, checkpoint, prefer)
    write_text(out / "recipe.yaml", recipes.dump(recipe))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / WEIGHTS)


def export_command(source: Path, out: Path, ema: str | None = None, allow_timestep_mismatch: bool = False) -> None:
    """Write the model of a run (its newest whole checkpoint) or of a model folder as a folder of diffusers.

    Args:
        ema: for a run, as in `megadit sample`: an average's name, "weight" for the raw weights, None for the first.
        allow_timestep_mismatch: see `megadit.interop.diffusers.export`.

    Raises:
        ValueError: `source` is neither, or diffusers has no class or pipeline for the model.
    """
    model, recipe = _load(source, ema)
    readout = model.get_submodule(models.family_of(recipe.model).readout)
    assert isinstance(readout, Readout), type(readout)
    export(recipe, model.state_dict(), readout.multiplier, out, allow_timestep_mismatch)


def _load(source: Path, ema: str | None) -> tuple[nn.Module, Recipe]:
    if not (source / WEIGHTS).is_file():
        return load_model(source, ema)
    if ema is not None:
        raise ValueError(f"{source} is a model folder, which has no averages to choose from: leave out {ema!r}")
    recipe = run_folder.load_recipe(source)
    model = models.build(recipe.model)
    set_multipliers(model, build_table(recipe))
    load_strictly(model, read_published(source / WEIGHTS), str(source / WEIGHTS))
    return model, recipe
