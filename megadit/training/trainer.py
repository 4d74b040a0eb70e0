"""The training loop. A run is a function of its recipe; the number of images seen says where it is."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megadit import engines, objectives
from megadit.data.batch import Batch
from megadit.data.manifest import Manifest
from megadit.data.stream import Stream
from megadit.engines import base
from megadit.engines.base import Engine, LossClosure
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe, check_world_size
from megadit.training import checkpoint, run_folder
from megadit.training.ema import Averages
from megadit.training.ranks import on_first_rank, process_group, rank, world_size
from megadit.training.reporter import Reporter, banner
from megadit.training.signals import StopRequest, stop_on_signal
from megadit.training.validation import validate

EXIT_DONE, EXIT_INTERRUPTED = 0, 75  # 75 is EX_TEMPFAIL: run it again
logger = logging.getLogger(__name__)


def train(recipe: Recipe, run: Path) -> int:
    """Train to the end or to a stop signal, continuing what `run` holds. Returns the exit status.

    Ranks are those of RANK and WORLD_SIZE, as torchrun sets them; every rank calls this with the same recipe.
    """
    with process_group(needed=recipe.engine.kind != "single"), stop_on_signal() as stop:
        check_world_size(recipe, world_size())
        if recipe.engine.kind == "single" and world_size() > 1:
            raise ValueError(f"engine.kind single runs on one rank, not {world_size()}; use fsdp or zero3")
        specs = build_table(recipe)
        manifest = on_first_rank(lambda: Manifest.load(recipe.data.url))
        check_data_fits(recipe, manifest)
        on_first_rank(lambda: run_folder.prepare(run, recipe, specs, manifest))
        if rank() == 0:
            logger.info(banner(recipe, specs, manifest.num_samples, world_size()))
        return Trainer(recipe, run, engines.build(recipe), stop).train()


def check_data_fits(recipe: Recipe, manifest: Manifest) -> None:
    """Raise ValueError unless the model takes the pictures and the text features of the data set."""
    image, text = manifest.image, manifest.text
    theirs = {
        "input_size": image.size,
        "in_channels": image.channels,
        "text_dim": text.dim,
        "pooled_dim": text.pooled_dim,
        "num_classes": len(manifest.labels),
    }
    settings = recipe.model.model_dump()
    pairs = {f"model.{key}": (settings[key], value) for key, value in theirs.items() if key in settings}
    if "max_text_tokens" in settings and settings["max_text_tokens"] < text.max_tokens:
        raise ValueError(
            f"the data at {recipe.data.url} has captions of up to {text.max_tokens} tokens, "
            f"the model takes model.max_text_tokens {settings['max_text_tokens']}"
        )
    wrong = [f"{key} is {ours}, the data has {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs]
    if wrong:
        raise ValueError(f"the model does not fit the data at {recipe.data.url}: {'; '.join(wrong)}")


class Trainer:
    """One run: steps, averages, validation, checkpoints, reports."""

    def __init__(self, recipe: Recipe, run: Path, engine: Engine, stop: StopRequest) -> None:
        self._recipe = recipe
        self._run = run
        self._engine = engine
        self._stop = stop
        self._objective = objectives.build(recipe, engine.device)
        self._averages = Averages(engine.shards, recipe.training.ema_rates)
        self._images_seen = 0

    def train(self) -> int:
        self._resume()
        last_image = self._recipe.training.num_images
        with Reporter(self._recipe, self._run, self._images_seen) as reporter:
            for batch in self._batches():
                self._step(batch, reporter)
                done = self._images_seen >= last_image
                stopping = self._agreed_to_stop()
                if self._recipe.validation and (done or self._passed(self._recipe.validation.every_images)):
                    self._validate(reporter)
                if done or stopping or self._passed(self._recipe.checkpoints.every_images):
                    self._save()
                if stopping and not done:
                    reporter.say(f"stopped at {self._images_seen} images with a checkpoint; run it again to resume")
                    return EXIT_INTERRUPTED
        return EXIT_DONE

    def _resume(self) -> None:
        path = checkpoint.newest_valid(self._run / "checkpoints")
        if path is None:
            return
        self._images_seen = checkpoint.load(path, self._engine, self._averages).images_seen
        if rank() == 0:
            logger.info("resumed from %s", path)

    def _batches(self) -> Iterator[Batch]:
        """This rank's part of every step that is left."""
        recipe = self._recipe
        first_step = self._images_seen // recipe.training.batch_size
        if first_step < recipe.num_steps:
            stream = Stream(recipe.data, recipe.seed, recipe.training.batch_size, rank(), world_size())
            batches = stream.iterate(first_step)
            for _ in range(first_step, recipe.num_steps):
                yield next(batches)

    def _step(self, batch: Batch, reporter: Reporter) -> None:
        batch_size = self._recipe.training.batch_size
        step = self._images_seen // batch_size
        timestep_B = self._objective.timesteps(batch.timestep_uniform)
        micro_batch_size = self._recipe.training.micro_batch_size or len(batch)
        losses = [
            self._loss_of(part, part_B)
            for part, part_B in zip(batch.split(micro_batch_size), timestep_B.split(micro_batch_size), strict=True)
        ]
        try:
            loss_B, grad_norm = self._engine.train_step(losses, lr_factor(self._recipe, step))
        except FloatingPointError as error:
            raise ValueError(f"step {step} ({self._images_seen} images seen): {error}") from None
        self._averages.update()
        self._images_seen += batch_size
        reporter.step(self._images_seen, timestep_B, loss_B.cpu(), grad_norm, lr_factor(self._recipe, step))

    def _loss_of(self, batch: Batch, timestep_B: Tensor) -> LossClosure:
        device = self._engine.device
        return lambda model: self._objective.losses(model, batch.to(device), timestep_B.to(device))

    def _passed(self, every_images: int) -> bool:
        """Whether the step just made reached or crossed a multiple of `every_images`."""
        return self._images_seen % every_images < self._recipe.training.batch_size

    def _agreed_to_stop(self) -> bool:
        """All ranks stop after the same step, whichever of them got the signal."""
        return bool(base.sum_over_ranks(torch.tensor(int(bool(self._stop)))).item())

    def _validate(self, reporter: Reporter) -> None:
        reporter.validation(self._images_seen, "raw", validate(self._engine, self._objective, self._recipe))
        for name, values in self._averages.by_name().items():
            with base.replaced_weights(self._engine, values):
                reporter.validation(self._images_seen, name, validate(self._engine, self._objective, self._recipe))

    def _save(self) -> None:
        checkpoint.save(
            self._run / "checkpoints",
            self._engine,
            self._averages,
            images_seen=self._images_seen,
            num_steps=self._images_seen // self._recipe.training.batch_size,
            keep=self._recipe.checkpoints.keep,
        )


def lr_factor(recipe: Recipe, step: int) -> float:
    """The learning rate of step `step` (from 0) as a fraction of the recipe's."""
    warmup = recipe.optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if recipe.optimizer.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.num_steps - warmup)))
