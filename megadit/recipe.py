"""The recipe: one YAML file, one frozen tree, everything that a run is a function of.

`load("quickstart", ["optimizer.lr=2^-8"])` reads a shipped recipe by name or any file by path, merges what it
`extends`, applies `key.sub=value` overrides and validates. An error names the key, quotes the value and says what is
allowed.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

RECIPE_FOLDER = Path(str(files("megadit.recipes")))


class RecipeError(ValueError):
    """A recipe that cannot be used: what was wrong, where, and what is allowed."""


def _parse_power(value: Any) -> Any:
    """Read `2^-10` as 2.0 ** -10, so that recipes can state learning rates as the papers do."""
    if isinstance(value, str):
        if match := re.fullmatch(r"\s*([\d.]+)\s*(?:\^|\*\*)\s*([-+]?[\d.]+)\s*", value):
            return float(match[1]) ** float(match[2])
        try:
            return float(value)  # YAML 1.1 reads 1e-4 (no dot) as a string
        except ValueError:
            return value
    return value


Power = Annotated[float, BeforeValidator(_parse_power)]
PositiveInt = Annotated[int, Field(ge=1)]


class Node(BaseModel):
    """Base of every level of the tree: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MMDiTModel(Node):
    """Joint image/text transformer (SD3, arXiv 2403.03206)."""

    family: Literal["mmdit"] = "mmdit"
    input_size: PositiveInt  # side of the square input, in pixels or latent pixels
    in_channels: PositiveInt = 3
    patch_size: PositiveInt = 2
    width: PositiveInt
    depth: PositiveInt
    head_dim: PositiveInt = 64  # fixed under muP: a wider model has more heads
    mlp_ratio: PositiveInt = 4
    text_dim: PositiveInt = 4096  # features of one text token
    pooled_dim: PositiveInt = 4096  # features of the pooled text vector

    @model_validator(mode="after")
    def _check(self) -> "MMDiTModel":
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} must be a multiple of head_dim {self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 (two-dimensional sine-cosine positions)")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} must be a multiple of patch_size {self.patch_size}")
        return self

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim


class Parametrization(Node):
    """How initialisation and learning rates depend on width."""

    kind: Literal["mup", "sp"] = "mup"
    base_shapes: str | None = None  # a .bsh file: a name in shapes/ or a path
    base_width: PositiveInt | None = None  # or the width of the base model, built on the meta device
    output_mult: Annotated[float, Field(gt=0)] = 1.0
    adaln_init: Literal["zero", "normal"] = "zero"

    @model_validator(mode="after")
    def _check(self) -> "Parametrization":
        if self.kind == "mup" and (self.base_shapes is None) == (self.base_width is None):
            raise ValueError("mup needs exactly one of base_shapes and base_width")
        return self


class FlowObjective(Node):
    """Rectified flow with logit-normal timesteps (arXiv 2403.03206, section 3.1)."""

    kind: Literal["flow"] = "flow"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    num_loss_bins: PositiveInt = 4  # timestep bins whose losses are logged on their own


class Data(Node):
    """Where the packed samples lie and how they are dealt. What is dealt at a step depends on nothing else."""

    url: str  # s3://bucket/prefix or file:///folder of a packed data set
    validation_url: str | None = None
    num_streams: PositiveInt = 4  # K: the number of ranks divides it, it divides the batch size
    chunk_samples: PositiveInt = 8  # C: neighbours read by one Range GET
    chunks_per_group: PositiveInt = 4  # G: chunks whose samples are shuffled together in memory
    num_workers: Annotated[int, Field(ge=0)] = 0  # decoding processes per rank; 0 decodes in the trainer


class Optimizer(Node):
    """AdamW; `lr` is the base learning rate, which the parametrization scales by role."""

    lr: Annotated[Power, Field(gt=0)]
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[Power, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"  # after warm-up; cosine ends at zero


class Training(Node):
    """How long, how much at once, how precisely."""

    num_images: PositiveInt
    batch_size: PositiveInt  # samples of one optimizer step, over all ranks
    micro_batch_size: PositiveInt | None = None  # samples of one forward pass on one rank; default: no accumulation
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products; weights, moments and reductions stay fp32
    ema_rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.999,)
    log_every_steps: PositiveInt = 10

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if self.num_images % self.batch_size:
            raise ValueError(f"num_images {self.num_images} must be a multiple of batch_size {self.batch_size}")
        return self


class Engine(Node):
    """How the model is spread over processes; has no effect on the trajectory."""

    kind: Literal["single", "fsdp", "zero3"] = "single"
    num_ranks: PositiveInt = 1  # local processes that `megadit train` starts
    reshard_after_forward: bool = True  # fsdp: free gathered weights before the backward pass gathers them again


class Checkpoints(Node):
    every_images: PositiveInt
    keep: PositiveInt = 2


class Validation(Node):
    every_images: PositiveInt
    num_timesteps: PositiveInt = 8  # strata; every validation sample is scored at each
    batch_size: PositiveInt = 64  # samples of one forward pass on one rank


class Recipe(Node):
    """The whole tree."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: MMDiTModel
    parametrization: Parametrization
    objective: FlowObjective = FlowObjective()
    data: Data
    optimizer: Optimizer
    training: Training
    engine: Engine = Engine()
    checkpoints: Checkpoints
    validation: Validation | None = None

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        batch, streams, ranks = self.training.batch_size, self.data.num_streams, self.engine.num_ranks
        check_world_size(self, ranks)
        if batch % streams:
            raise ValueError(f"data.num_streams {streams} must divide training.batch_size {batch}")
        if self.engine.kind == "single" and ranks != 1:
            raise ValueError(f"engine.kind single runs on one rank, not {ranks}; use fsdp or zero3")
        if self.validation and self.data.validation_url is None:
            raise ValueError("validation needs data.validation_url")
        return self

    @property
    def num_steps(self) -> int:
        return self.training.num_images // self.training.batch_size


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """Raise ValueError unless `world_size` ranks can share the recipe's streams and micro-batches evenly."""
    batch, streams = recipe.training.batch_size, recipe.data.num_streams
    if streams % world_size:
        divisors = [n for n in range(1, streams + 1) if streams % n == 0]
        raise ValueError(
            f"{world_size} ranks do not divide data.num_streams {streams}; possible numbers of ranks: {divisors}"
        )
    micro = recipe.training.micro_batch_size
    if micro is not None and (batch // world_size) % micro:
        raise ValueError(
            f"training.micro_batch_size {micro} must divide the {batch // world_size} samples "
            f"that each of {world_size} ranks takes of batch_size {batch}"
        )


# Keys that may change between a run and its continuation: they have no effect on the trajectory.
FREE_KEYS = (
    "engine",
    "checkpoints",
    "data.url",
    "data.validation_url",
    "data.num_workers",
    "training.micro_batch_size",
    "training.log_every_steps",
)


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe `source` (a shipped name or a path) with `key.sub=value` overrides.

    Raises RecipeError for everything that a user can get wrong.
    """
    tree = _read_tree(resolve(source), seen=())
    for override in overrides:
        _apply_override(tree, override)
    return parse(tree, str(source))


def parse(tree: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a plain tree, as read from YAML."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item, tree) for item in error.errors()]
        raise RecipeError(f"{source}: " + "; ".join(lines)) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse(yaml.safe_load(dump(r))) == r`."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def resolve(source: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
    elif (RECIPE_FOLDER / f"{source}.yaml").is_file():
        return RECIPE_FOLDER / f"{source}.yaml"
    shipped = sorted(p.stem for p in RECIPE_FOLDER.glob("*.yaml"))
    raise RecipeError(f"no recipe {str(source)!r}: give the path of a .yaml file or one of {', '.join(shipped)}")


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, mapped to (old, new)."""
    flat_old, flat_new = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return {k: (flat_old.get(k), flat_new.get(k)) for k in keys if flat_old.get(k) != flat_new.get(k)}


def is_free(key: str) -> bool:
    """Whether a dotted key may change when a run is resumed."""
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(
            f"{path}: recipes extend each other in a circle: {' -> '.join(p.name for p in (*seen, path))}"
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    is_file = Path(str(parent)).suffix in (".yaml", ".yml")
    return _merge(_read_tree(resolve(path.parent / parent if is_file else str(parent)), (*seen, path)), tree)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r} is not of the form key.sub=value")
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: not a YAML value: {error}") from None


def _explain(item: Any, tree: Mapping[str, Any]) -> str:
    """One line for one pydantic error: the path, the value, and what is allowed."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if item["type"] == "missing":
        return f"{path} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path} = {item['input']!r}: {message}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys of the section at `location` of the tree."""
    node: type[BaseModel] = Recipe
    for part in location:
        field = node.model_fields.get(str(part))
        if field is None:
            break
        candidates = [field.annotation, *get_args(field.annotation)]
        node = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), node)
    return list(node.model_fields)
