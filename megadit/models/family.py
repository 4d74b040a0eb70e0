"""What a model family is: everything that the rest of the project has to know about one architecture.

A family is a folder here with one `Family`, which `megadit/models/__init__.py` registers; nothing outside asks which
family a model is of. Another one, in a module of a user's, registers itself when it is imported (`imports:` of the
recipe).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import model_validator
from torch import nn

from megadit.models.rules import Rules
from megadit.node import STAGE, Node, PositiveInt

if TYPE_CHECKING:
    from megadit.models.diffusers_format import DiffusersFormat


@dataclass(frozen=True)
class Conditions:
    """What a model takes beside pictures and timesteps; None is what it does not take."""

    num_classes: int | None = None
    text_dim: int | None = None  # features of one text token
    pooled_dim: int | None = None  # features of the pooled text vector
    max_text_tokens: int | None = None  # None: as many as there are

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a Batch that hold them: the keyword arguments of the model."""
        taken = (self.num_classes, self.text_dim, self.text_dim, self.pooled_dim)
        names = ("labels", "text", "text_lengths", "pooled")
        return tuple(name for name, size in zip(names, taken, strict=True) if size is not None)


class ModelConfig(Node):
    """The `model` section of a recipe: what all families share.

    Sizes count what the field counts: `width` in features, `depth` in blocks, `input_size` in pixels or latent pixels.
    Under muP `head_dim` is fixed: a wider model has more heads.
    """

    family: str
    # Side of the square input; 32 latent pixels are 256 pixels of the usual autoencoder. No parameter depends on it.
    input_size: Annotated[PositiveInt, STAGE] = 32
    in_channels: PositiveInt = 4
    patch_size: PositiveInt = 2
    width: PositiveInt
    depth: PositiveInt
    head_dim: PositiveInt
    mlp_ratio: PositiveInt = 4

    @model_validator(mode="after")
    def _check_sizes(self) -> "ModelConfig":
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

    @property
    def num_patches(self) -> int:
        """Tokens of a picture of input_size."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Twice in_channels where the model predicts a variance, too."""
        return self.in_channels

    @property
    def feature_dim(self) -> int | None:
        """Features that a head on the image tokens predicts of a pretrained encoder (REPA); None without one."""
        return None

    def with_depth(self, depth: int) -> Self:
        """The same model of so many blocks."""
        return self.model_copy(update={"depth": depth})

    @property
    @abstractmethod
    def conditions(self) -> Conditions: ...


@dataclass(frozen=True)
class ForwardFlops:
    """Floating-point operations of the matrix products of one sample's forward pass in training.

    A multiply-add counts as two.
    """

    blocks: tuple[int, ...]  # of each of `model.blocks`
    outside: int  # of all other layers
    first_layers: int  # of these, the layers whose input needs no gradient: pictures, timesteps, text
    attention: int  # of the blocks', products of pairs of tokens

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.outside


@dataclass(frozen=True)
class Family:
    """One architecture. Its name is the default of `config.family`.

    A model is called as `model(x_BCHW, timestep_B, dropped_B=..., **conditions)`, see `megadit.models`, and has
    `blocks`, an nn.ModuleList, which is what engines shard.
    """

    config: type[ModelConfig]
    build: Callable[[Any], nn.Module]  # from a config; weights are torch's defaults
    forward_flops: Callable[[Any, int], ForwardFlops]  # of (config, text tokens)
    initial: Mapping[str, Rules]  # by parametrization: "mup, paper", "mup, zero" and "sp"
    readout: str  # the Readout that predicts, by its name in the model
    tables: tuple[str, ...] = ()  # last names of parameters that are tables: rows of width
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # model.preset -> settings
    kernels: tuple[str, ...] = ()  # those of megadit.kernels that it calls
    has_published: bool = False  # there are published checkpoints, in whose names and layout the model's tensors are
    diffusers: "Callable[[], DiffusersFormat] | None" = None  # a function, as diffusers takes long to import

    @property
    def name(self) -> str:
        return str(self.config.model_fields["family"].default)
