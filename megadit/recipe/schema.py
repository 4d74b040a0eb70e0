"""The recipe: one frozen tree, everything that a run is a function of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from megadit.models import FAMILIES, ModelConfig
from megadit.node import FREE, STAGE, Fraction, Mark, Node, PositiveInt, identity
from megadit.objectives import OBJECTIVES, ObjectiveConfig, sampler_names
from megadit.objectives.flow import FlowObjective
from megadit.optimizers import OPTIMIZERS, OptimizerConfig
from megadit.registry import Registry


class Parametrization(Node):
    """How initialisation and learning rates depend on width."""

    kind: Literal["mup", "sp"] = "mup"
    base_shapes: str | None = None  # a .bsh file: a name in shapes/ or a path
    base_width: PositiveInt | None = None  # or the width of the base model, built on the meta device
    output_mult: Annotated[float, Field(gt=0)] = 1.0
    # mup only: how the modulation starts. paper: as the hidden matrices that it is made of; zero: adaLN-Zero.
    adaln_init: Literal["paper", "zero"] = "zero"
    # mup only: the decay per step of hidden matrices, lr * weight decay, goes with m^-decay_exponent. 0 is the rule of
    # microsoft/mup, 1/2 that of arXiv 2510.15262, 1 that of arXiv 2512.05620.
    decay_exponent: Annotated[float, Field(ge=0, le=1)] = 0.0
    scale_eps: bool = False  # mup only: Adam's eps / m for hidden matrices, whose gradients shrink as 1/m

    @model_validator(mode="after")
    def _check(self) -> "Parametrization":
        if self.kind == "mup" and (self.base_shapes is None) == (self.base_width is None):
            raise ValueError("mup needs exactly one of base_shapes and base_width")
        return self


class Data(Node):
    """Where the samples lie and how they are dealt. What is dealt at a step depends on nothing else."""

    url: Annotated[str, FREE]  # s3://bucket/prefix or file:///folder of a data set
    validation_url: Annotated[str | None, FREE] = None
    num_streams: Annotated[PositiveInt, STAGE] = 4  # K: the number of ranks divides it, it divides the batch size
    chunk_samples: Annotated[PositiveInt, STAGE] = 8  # C: neighbours read by one Range GET
    chunks_per_group: Annotated[PositiveInt, STAGE] = 4  # G: chunks whose samples are shuffled together in memory
    num_workers: Annotated[int, Field(ge=0), FREE] = 0  # decoding processes per rank; 0 decodes in the trainer
    # Of data sets whose pictures lie as they were found: the side in pixels of the square that they are brought to, or
    # of the square as large as each aspect-ratio bucket.
    resolution: Annotated[PositiveInt | None, STAGE] = None
    aspect_buckets: Annotated[bool, STAGE] = False
    # How they are brought to it, to the last bit.
    decoder: Annotated[Literal["pillow-draft-bicubic"], STAGE] = "pillow-draft-bicubic"
    memory_mb: Annotated[PositiveInt, FREE] = 4096  # 10^6 bytes: the most that a rank's stream holds, read and decoded
    cache_folder: Annotated[str | None, FREE] = (
        None  # on a local disk, shared by the ranks of a node; chunks are kept there
    )
    cache_gb: Annotated[float, Field(gt=0), FREE] = 100.0  # 10^9 bytes
    client: Annotated[Literal["boto3", "obstore"], FREE] = "boto3"  # who reads from S3; obstore is an optional package
    max_corrupt_share: Annotated[Fraction, FREE] = 0.001  # of a rank's samples; more that are corrupt stop the run

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.aspect_buckets and self.resolution is None:
            raise ValueError("aspect_buckets needs resolution, the side of the square bucket in pixels")
        return self


class Encoders(Node):
    """Frozen encoders that run in the trainer, for data with captions or pictures and no features of them."""

    text: str | None = None  # minilm, or the folder of a transformers text model
    max_tokens: PositiveInt = 120  # captions are cut after so many
    vae: str | None = None  # folder of an AutoencoderKL of diffusers
    sharded: Annotated[bool, FREE] = False  # the weights of the text encoder are spread over the ranks

    @model_validator(mode="after")
    def _check(self) -> "Encoders":
        if self.text is None and self.vae is None:
            raise ValueError("state text, vae or both")
        if self.sharded and self.text is None:
            raise ValueError("sharded is about the text encoder; state text")
        return self


_AVERAGED = identity("an average is of all steps so far")


def average_names(rates: Sequence[float], power_stds: Sequence[float]) -> list[str]:
    """What averages are called in checkpoints, recipes and commands, in the order in which they are listed there."""
    return [*(f"ema_{rate}" for rate in rates), *(f"ema_std{std}" for std in power_stds)]


class Training(Node):
    """How long, how much at once, how precisely."""

    num_images: Annotated[PositiveInt, STAGE]
    batch_size: Annotated[PositiveInt, STAGE]  # samples of one optimizer step, over all ranks
    # Samples of one forward pass on one rank; default: no accumulation.
    micro_batch_size: Annotated[PositiveInt | None, FREE] = None
    # Of matrix products; weights, moments and reductions stay fp32. tf32 is for GPUs: a CPU computes it in fp32.
    precision: Annotated[Literal["fp32", "tf32", "bf16"], STAGE] = "fp32"
    # Averages: what each keeps at a step.
    ema_rates: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], _AVERAGED] = (0.999,)
    # More averages, over the last share of training (EDM2, arXiv 2312.02696): standard deviations of a power function
    # relative to the length of training so far, such as 0.05 and 0.1. The most, 12^-1/2, weighs all steps alike.
    ema_power_stds: Annotated[tuple[Annotated[float, Field(gt=0, le=12**-0.5)], ...], _AVERAGED] = ()
    log_every_steps: Annotated[PositiveInt, FREE] = 10
    # Steps in a row that may be skipped because a loss or a gradient is not finite; the last of them stops the run. A
    # broken sample costs one step and a spike two; what goes on longer comes from the weights or the learning rate.
    max_skipped_steps: Annotated[PositiveInt, FREE] = 3
    stall_seconds: Annotated[float, Field(gt=0), FREE] = 600  # without progress, after which a run that hangs ends

    @model_validator(mode="after")
    def _check(self) -> "Training":
        if self.num_images % self.batch_size:
            raise ValueError(f"num_images {self.num_images} must be a multiple of batch_size {self.batch_size}")
        return self

    @property
    def average_names(self) -> list[str]:
        return average_names(self.ema_rates, self.ema_power_stds)


_ONE_COMMAND = Mark(at_resume=True, reason="one command starts the processes of all stages")


class Engine(Node):
    """How the model is spread over processes; has no effect on the trajectory but rounding."""

    kind: Literal["single", "fsdp", "zero1", "zero2", "zero3"] = "single"
    num_ranks: Annotated[PositiveInt, _ONE_COMMAND] = 1  # local processes that `megadit train` starts
    num_replicas: PositiveInt = 1  # fsdp: the model is sharded over ranks / replicas, gradients go over all (HSDP)
    reshard_after_forward: bool = True  # fsdp: free gathered weights before the backward pass gathers them again
    # fsdp with several micro-batches: gradients are added up over ranks after each and kept as shards, or kept whole on
    # every rank until the last, which takes 4 bytes a parameter and spares the other micro-batches their collectives.
    accumulation: Literal["sharded", "whole"] = "sharded"
    # Which blocks compute their activations again in the backward pass: all, every k-th (k = 1 is all), or all of them
    # except the outputs of matrix products and attention (selective).
    activation_checkpointing: Literal["none", "selective", "full"] | PositiveInt = "none"
    compile: bool = False  # torch.compile for each block
    cpu_offload: Literal["none", "optimizer", "all"] = "none"  # optimizer: its state and update; all: the weights, too

    @model_validator(mode="after")
    def _check(self) -> "Engine":
        if self.num_replicas > 1 and self.kind != "fsdp":
            raise ValueError(f"num_replicas {self.num_replicas} needs kind fsdp; {self.kind} has no replicas of shards")
        if self.accumulation == "whole" and self.kind != "fsdp":
            raise ValueError(f"accumulation whole needs kind fsdp; {self.kind} has one way to add up micro-batches")
        possible, reason = _OFFLOADS[self.kind]
        if self.cpu_offload not in possible:
            raise ValueError(f"cpu_offload {self.cpu_offload} is not possible with kind {self.kind}: {reason}")
        if self.compile and self.kind == "zero3":
            raise ValueError("compile is not possible with kind zero3, whose hooks gather weights inside the blocks")
        return self


class Hardware(Node):
    """The machine that a recipe is made for: `megadit plan` starts from it. Has no effect on training."""

    gpu: str  # a name in the table of `megadit plan`, such as h100
    num_nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node


# What each engine can keep on the CPU, and why it cannot do the rest.
_OFFLOADS: dict[str, tuple[tuple[str, ...], str]] = {
    "single": (("none",), "one process updates its weights where they are; use fsdp on one rank"),
    "fsdp": (("none", "all"), "FSDP2 moves weights, gradients and optimizer state together; use all"),
    "zero1": (("none", "optimizer"), "it keeps whole weights on the device; use zero3 or fsdp"),
    "zero2": (("none", "optimizer"), "it keeps whole weights on the device; use zero3 or fsdp"),
    "zero3": (("none", "optimizer", "all"), ""),
}


class Checkpoints(Node):
    """When the state of a run is saved, and which states stay."""

    every_images: PositiveInt
    keep: PositiveInt = 2  # the newest so many stay
    keep_every_images: PositiveInt | None = None  # so does, for ever, the first one of each interval of so many images
    asynchronous: bool = True  # written beside training, from a copy in memory as large as this rank's state
    # s3://bucket/prefix that each is copied to; a run without any of its own resumes there
    copy_url: Annotated[str | None, Mark(at_resume=True, reason="a run has its copies in one place")] = None

    @field_validator("copy_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("s3://", "file://")):
            raise ValueError("must be s3://bucket/prefix or file:///folder")
        return url


class Validation(Node):
    every_images: PositiveInt
    num_timesteps: PositiveInt = 8  # strata; every validation sample is scored at each
    batch_size: PositiveInt = 64  # samples of one forward pass on one rank


TaskName = Literal["geneval", "mjhq", "coco30k", "imagenet50k", "prompts"]
LabelOrder = Literal["balanced", "random"]
GenerationPrecision = Literal["fp32", "bf16"]


class EvaluationMetric(Node):
    """A number, by the name that `megadit eval score` takes, and what pictures are compared with."""

    name: str
    reference: str | None = None  # a folder of images or an .npz of statistics
    resize: str | None = None


class EvaluationTask(Node):
    """Images and the metrics on them; the settings are the options of `megadit eval generate`."""

    task: TaskName
    name: str = ""  # of its folder; default: the task's
    prompts: str | None = None
    prompts_sha256: str | None = None
    images_per_prompt: PositiveInt | None = None
    labels: LabelOrder | None = None
    sampler: str | None = None  # of the objective
    num_steps: PositiveInt | None = None
    shift: Annotated[float, Field(gt=0)] | None = None
    guidance_scale: Annotated[float, Field(ge=0)] = 4.0
    guidance_channels: PositiveInt | None = None
    metrics: tuple[EvaluationMetric, ...] = ()

    @field_validator("sampler")
    @classmethod
    def _check_sampler(cls, sampler: str | None) -> str | None:
        if sampler is not None and sampler not in sampler_names():
            raise ValueError(f"no sampler {sampler!r}: there are {', '.join(sampler_names())}")
        return sampler


class Evaluation(Node):
    """What `megadit eval suite` does with the checkpoints of a run. Has no effect on training."""

    tasks: Annotated[tuple[EvaluationTask, ...], Field(min_length=1)]
    weights: str  # folder of the metrics' weights; package:NAME/FOLDER is one inside an installed package
    checkpoints: Literal["newest", "all"] = "newest"
    ema: str | None = None  # default: the first average
    batch_size: PositiveInt = 32
    precision: GenerationPrecision = "fp32"
    encoder: str | None = None
    vae: str | None = None

    @field_validator("tasks")
    @classmethod
    def _check_names(cls, tasks: tuple[EvaluationTask, ...]) -> tuple[EvaluationTask, ...]:
        named = tuple(task if task.name else task.model_copy(update={"name": task.task}) for task in tasks)
        names = [task.name for task in named]
        if wrong := [name for name in names if names.count(name) > 1 or Path(name).name != name]:
            raise ValueError(f"task name {wrong[0]!r}: must be the name of a folder, another one for each task")
        return named


class Recipe(Node):
    """The whole tree."""

    name: Annotated[str, identity("it is what the run is called")]
    # Python modules that add model families, objectives or optimizers; they are imported before the rest is read.
    imports: Annotated[tuple[str, ...], identity("they say what the model is")] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63), identity("weights, order and noise are drawn from it")] = 0
    model: Annotated[SerializeAsAny[ModelConfig], identity("the weights are those of this model")]
    parametrization: Annotated[Parametrization, identity("the weights are scaled by it")]
    objective: SerializeAsAny[ObjectiveConfig] = FlowObjective()
    data: Data
    encoders: Annotated[Encoders | None, STAGE] = None
    optimizer: SerializeAsAny[OptimizerConfig]
    training: Training
    engine: Annotated[Engine, FREE] = Engine()
    hardware: Annotated[Hardware | None, FREE] = None
    checkpoints: Annotated[Checkpoints, FREE]
    validation: Annotated[Validation | None, FREE] = None
    eval: Annotated[Evaluation | None, Mark(at_resume=True, reason="a run is evaluated in one way")] = None
    # Where transferred hyperparameters come from; `megadit transfer` writes it.
    provenance: Annotated[dict[str, Any] | None, Mark(at_resume=True, reason="it is about the whole recipe")] = None
    # Parts of one run, one after the other: what each changes of the rest, which is a recipe itself. See stages.py.
    stages: Annotated[tuple[dict[str, Any], ...], identity("stages are compared one by one")] = ()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        batch, streams, ranks = self.training.batch_size, self.data.num_streams, self.engine.num_ranks
        check_world_size(self, ranks)
        total, where = (self.hardware.num_gpus, "the GPUs of hardware") if self.hardware else (ranks, "num_ranks")
        if total > 1 and total % self.engine.num_replicas:
            raise ValueError(f"engine.num_replicas {self.engine.num_replicas} must divide {where}: {total}")
        if batch % streams:
            raise ValueError(f"data.num_streams {streams} must divide training.batch_size {batch}")
        if self.engine.kind == "single" and ranks != 1:
            raise ValueError(f"engine.kind single runs on one rank, not {ranks}; use another engine.kind")
        if self.encoders and self.encoders.sharded and self.engine.kind == "single":
            raise ValueError("encoders.sharded needs an engine of several ranks; engine.kind is single")
        if self.validation and self.data.validation_url is None:
            raise ValueError("validation needs data.validation_url")
        self.objective.check_model(self.model)
        return self

    @property
    def num_steps(self) -> int:
        return self.training.num_images // self.training.batch_size


@dataclass(frozen=True)
class Section:
    """A section of the recipe that is one of several kinds, and the key in it that says which."""

    key: str
    registry: Registry[Any]
    default: str | None = None

    def kinds(self) -> dict[str, type[Node]]:
        """The classes of settings, by the value of the key."""
        return {name: self.registry.get(name).config for name in self.registry.names}


SECTIONS: Mapping[str, Section] = {
    "model": Section("family", FAMILIES),
    "objective": Section("kind", OBJECTIVES),
    "optimizer": Section("kind", OPTIMIZERS, default="adamw"),
}


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
