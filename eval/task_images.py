"""`megadit eval generate`: the images of a task by a checkpoint, shared by ranks, whole or going on.

Units are taken in batches of fixed composition, batch b by rank b % D, because the last bits of a matrix product depend
on its batch; the noise of a unit depends on (task, prompt number, image number) alone. So on one kind of machine an
image is the same, bit for bit, on any number of ranks and however often the job was interrupted.
"""

import hashlib
import importlib.metadata
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from megadit import journal
from megadit.checksums import sha256_of
from megadit.distributed import Topology
from megadit.eval import units
from megadit.eval.tasks.task import Record, Task
from megadit.files import write_bytes
from megadit.randomness import named_generator
from megadit.recipe import GenerationPrecision, Recipe
from megadit.sampling.generate import class_numbers, default_weights, load_conditioner, load_decoder, load_weights
from megadit.sampling.guidance import guide
from megadit.sampling.samplers import Sampler, choose
from megadit.training import checkpoint, run_folder
from megadit.training.checkpoint.folders import HEADER, images_seen

logger = logging.getLogger(__name__)

SEED_SCHEME = "blake2b(0/evaluation TASK prompt P image I), torch CPU generator, version 1"
LOG_SECONDS = 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = ("megadit", "torch", "diffusers", "transformers", "pillow")

Place = tuple[int, int]  # prompt number, image number


@dataclass(frozen=True)
class Options:
    """How a checkpoint is sampled. `ema` is an average's name, "weight", or None for the first average.

    `guidance_channels` are guided, the first ones, or all for None. `precision` is that of the weights of the model and
    the text encoder; what a sampler keeps, and the autoencoder, are in fp32.
    """

    ema: str | None = None
    sampler: str | None = None
    num_steps: int | None = None
    shift: float | None = None
    guidance_scale: float = 4.0
    guidance_channels: int | None = None
    batch_size: int = 32
    precision: GenerationPrecision = "fp32"
    encoder: str | None = None
    vae: str | None = None


@dataclass(frozen=True)
class _Job:
    """Everything that the images are a function of."""

    run: Path
    checkpoint: Path
    weights: str
    recipe: Recipe
    task: Task
    sampler: Sampler
    options: Options


def generate(task: Task, source: Path, out: Path, options: Options, topology: Topology) -> int:
    """Write the images of `task` that are not in `out` yet; the number that were made, over all ranks.

    Call it on all ranks of a process group. `source` is the folder of a run, whose newest whole checkpoint is taken, or
    of one checkpoint in it. Raises ValueError, on every rank, where the checkpoint, the weights or something that the
    model needs is missing, where sampler and model do not go together, and if `out` holds another job.
    """
    run, path = _find_checkpoint(source, topology)
    job = topology.on_first(lambda: _prepare(task, run, path, options))

    def begin() -> set[Place]:
        units.begin(out, _manifest(job), task.prompts())
        digests = units.finished(out)
        return {place for place in _places(task) if place not in digests or not units.image_path(out, *place).is_file()}

    missing = topology.on_first(begin)
    batches = _batches(_places(task), options.batch_size)
    mine = [batch for batch in batches[topology.rank :: topology.size] if not missing.isdisjoint(batch)]
    if topology.is_first:
        logger.info("%s: %d of %d images to do", out, len(missing), task.num_units)
    shares = topology.on_every(lambda: _generate(job, out, mine, missing, topology))
    made, seconds = sum(num for num, _ in shares), max(seconds for _, seconds in shares)
    if made and topology.is_first:
        logger.info("%d images in %.1f s: %.2f images/s on %d ranks", made, seconds, made / seconds, topology.size)
    topology.on_first(lambda: len(units.complete(out)))
    return made


def _find_checkpoint(source: Path, topology: Topology) -> tuple[Path, Path]:
    """Run and checkpoint, the newest whole one of a run; on all ranks together, which share the reading."""
    if (source / HEADER).is_file():
        return source.absolute().parents[1], source
    run_folder.load_recipe(source)  # says where `source` is no run
    newest = checkpoint.newest_valid(source / "checkpoints", topology)
    if newest is None:
        raise ValueError(f"{source} has no usable checkpoint yet")
    return source, newest


def _prepare(task: Task, run: Path, path: Path, options: Options) -> _Job:
    recipe = run_folder.recipe_of(path)
    kinds = ["weight", *checkpoint.read_header(path).averages]
    weights = options.ema or default_weights(path)
    if weights not in kinds:
        raise ValueError(f"checkpoint {path} has no weights {weights!r}; --ema can be one of: {', '.join(kinds)}")
    sampler = choose(recipe.objective, options.sampler, options.num_steps, options.shift)
    if recipe.model.in_channels != 3 and options.vae is None:
        raise ValueError(
            f"the model makes latents of {recipe.model.in_channels} channels: give the autoencoder's folder by --vae"
        )
    if (options.guidance_channels or 1) > recipe.model.in_channels:
        raise ValueError(
            f"--guidance-channels {options.guidance_channels}: the model has {recipe.model.in_channels} channels"
        )
    _check_conditions(recipe, task)
    return _Job(run, path, weights, recipe, task, sampler, options)


def _check_conditions(recipe: Recipe, task: Task) -> None:
    num_classes = task.settings.get("num_classes")
    if num_classes is None:
        return
    ours = recipe.model.conditions.num_classes
    if ours is None:
        raise ValueError(f"task {task.id} needs a model of classes; family {recipe.model.family} takes captions")
    if ours != num_classes:
        raise ValueError(f"task {task.id} has {num_classes} classes, the model {ours}")


def _manifest(job: _Job) -> dict[str, Any]:
    task, config = job.task, job.recipe.model
    header = (job.checkpoint / HEADER).read_bytes()
    return {
        "task": {"id": task.id, "version": task.version, **task.settings},
        "prompts_sha256": task.sha256,
        "num_units": task.num_units,
        "images_per_prompt": task.images_per_prompt,
        "checkpoint": {
            "run": job.recipe.name,
            "images_seen": images_seen(job.checkpoint),
            "sha256": hashlib.sha256(header).hexdigest(),  # of the header, which has the checksums of all files
        },
        "weights": job.weights,
        "sampler": job.sampler.describe(),
        "guidance_scale": job.options.guidance_scale,
        "guidance_channels": job.options.guidance_channels or config.in_channels,
        "seed_scheme": SEED_SCHEME,
        "batch_size": job.options.batch_size,
        "input_size": config.input_size,
        "autoencoder": _autoencoder_sha256(job.options.vae),
        "dtype": job.options.precision,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _autoencoder_sha256(vae: str | None) -> dict[str, str] | None:
    if vae is None:
        return None
    files = sorted(Path(vae).glob("*.safetensors"))
    if not files:
        raise ValueError(f"autoencoder {vae!r}: no such folder, or no .safetensors file in it")
    return {path.name: sha256_of(path) for path in files}


def _places(task: Task) -> list[Place]:
    return [(prompt, image) for prompt in range(len(task.records)) for image in range(task.images_per_prompt)]


def _batches(places: Sequence[Place], batch_size: int) -> list[Sequence[Place]]:
    return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]


@torch.inference_mode()
def _generate(
    job: _Job, out: Path, batches: Sequence[Sequence[Place]], missing: set[Place], topology: Topology
) -> tuple[int, float]:
    """Make the batches; of each, what is missing is written and then noted. Returns how many were, and the seconds."""
    if not batches:
        return 0, 0.0
    torch.backends.cudnn.allow_tf32 = False  # as scoring has it, so that a suite's images do not depend on its order
    options, device = job.options, topology.device
    model = load_weights(job.recipe, job.checkpoint, job.weights, DTYPES[options.precision]).to(device)
    conditions = _load_conditions(job, device)
    vae = options.vae
    decoder = load_decoder(vae, job.recipe, device) if vae is not None else None
    made, began, logged = 0, time.monotonic(), time.monotonic()
    with journal.appending(out / units.JOURNAL, topology.rank, topology.size) as append:
        for batch in batches:
            on_device = {name: value.to(device) for name, value in conditions(batch).items()}
            draws = _draws(job, batch)
            images = sample(
                model, job.recipe, on_device, job.sampler, options.guidance_scale, draws, options.guidance_channels
            )
            pictures = to_png(_finite(decoder.decode(images) if decoder else images, batch))
            made_now = [_write(out, place, png) for place, png in zip(batch, pictures, strict=True) if place in missing]
            append(journal.to_lines(*made_now))
            made += len(missing.intersection(batch))
            if topology.is_first and time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                logger.info("%d images, %.2f images/s a rank", made, made / (logged - began))
    return made, time.monotonic() - began


def _load_conditions(job: _Job, device: torch.device) -> Callable[[Sequence[Place]], Mapping[str, Tensor]]:
    """What makes the conditions of a batch."""
    records: list[Record] = job.task.records
    if "num_classes" in job.task.settings:
        return lambda batch: {"labels": torch.tensor([records[prompt]["label"] for prompt, _ in batch])}
    if job.recipe.model.conditions.num_classes is not None:
        classes = run_folder.load_manifest(job.run).labels
        class_numbers([record["prompt"] for record in records], classes)  # an unknown one is said before any is drawn
    dtype = DTYPES[job.options.precision]
    encode = load_conditioner(job.run, job.recipe, job.options.encoder, device, dtype)
    return lambda batch: encode([records[prompt]["prompt"] for prompt, _ in batch])


def _draws(job: _Job, batch: Sequence[Place]) -> list[torch.Generator]:
    return [named_generator(0, f"evaluation {job.task.id} prompt {prompt} image {image}") for prompt, image in batch]


def sample(
    model: nn.Module,
    recipe: Recipe,
    conditions: Mapping[str, Tensor],
    sampler: Sampler,
    guidance_scale: float,
    draws: Sequence[torch.Generator],
    guidance_channels: int | None = None,
) -> Tensor:
    """Images [B, C, H, W] under B conditions, on their device, about in [-1, 1] (latents: in their units).

    `draws[i]`, a generator on the CPU, gives the first noise of image i and then what the sampler adds. Guided are the
    first `guidance_channels` channels, or all.
    """
    config, device = recipe.model, next(iter(conditions.values())).device
    shape = (config.in_channels, config.input_size, config.input_size)
    noise_BCHW = torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(device)
    predict = guide(model, conditions, guidance_scale, guidance_channels or config.in_channels)
    return sampler.sample(predict, noise_BCHW, draws)


def _finite(images_BCHW: Tensor, batch: Sequence[Place]) -> Tensor:
    """`images_BCHW`. Raises ValueError for the first that is not finite: no picture must be made of it."""
    for (prompt, image), picture_CHW in zip(batch, images_BCHW, strict=True):
        if not bool(picture_CHW.isfinite().all()):
            raise ValueError(f"image {image} of prompt {prompt} is not finite: have these weights diverged?")
    return images_BCHW


def to_png(images_BCHW: Tensor) -> list[bytes]:
    """PNG files of pictures [B, 3, H, W]; -1 is black, 1 white, and what is outside is clipped."""
    levels = ((images_BCHW.clamp(-1, 1).float() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    files = []
    for pixels in levels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def _write(out: Path, place: Place, png: bytes) -> dict[str, Any]:
    write_bytes(units.image_path(out, *place), png)
    return {"prompt": place[0], "image": place[1], "sha256": hashlib.sha256(png).hexdigest()}
