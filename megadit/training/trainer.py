"""The training loop. A run is a function of its recipe; the number of images seen says where it is."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megadit import engines, objectives
from megadit.batch import Batch
from megadit.data.format.manifest import Manifest
from megadit.data.loading.loader import Loader
from megadit.distributed import Topology, process_group
from megadit.engines import base
from megadit.engines.base import Engine, LossClosure
from megadit.exit_codes import DONE, FAILED, INTERRUPTED, end_now
from megadit.parametrization.table import build_table
from megadit.recipe import Recipe, check_world_size, differences
from megadit.training import checkpoint, resuming, run_folder
from megadit.training.data_fits import check_data_fits
from megadit.training.ema import Averages
from megadit.training.online import OnlineEncoders, stream_draws_noise
from megadit.training.reporter import Reporter, banner
from megadit.training.signals import StopRequest, stop_on_signal
from megadit.training.skipped import SkippedSteps
from megadit.training.telemetry import Phase, Telemetry
from megadit.training.validation import ValidationLoss, validate
from megadit.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def end_process(error: Exception) -> None:
    """Say what was wrong, and end."""
    logger.critical("%s", error)
    end_now(FAILED)


def train(
    recipe: Recipe, run: Path, end: Callable[[Exception], object] = end_process, resume: str = resuming.AUTO
) -> int:
    """Train to the end or to a stop signal, continuing what `run` holds. Returns the exit status.

    Every rank that a launcher started calls this with the same recipe. `end` is
    called in another thread when the main one hangs, and ends the process. `resume` says what to begin with, see
    resuming.py.
    """
    # The watchdog names the rank that hangs; the time-out of the collectives, which would not, must come after it.
    timeout_seconds = max(600, 2 * recipe.training.stall_seconds)
    joining = process_group(recipe.engine.kind != "single", timeout_seconds, recipe.engine.num_replicas)
    with joining as topology, stop_on_signal() as stop:
        require_one_recipe(recipe, topology)
        check_world_size(recipe, topology.size)
        if recipe.engine.kind == "single" and topology.size > 1:
            raise ValueError(f"engine.kind single runs on one rank, not {topology.size}; use another engine.kind")
        specs = build_table(recipe)
        manifest = topology.on_first(lambda: Manifest.load(recipe.data.url))
        check_data_fits(recipe, manifest, _validation_manifest(recipe, topology))
        encoders = OnlineEncoders(recipe.encoders, recipe, topology) if recipe.encoders else None
        topology.on_first(lambda: resuming.check(resume, run, recipe, manifest))
        with run_folder.owned(run, topology):
            topology.on_first(lambda: run_folder.prepare(run, recipe, specs, manifest))
            if topology.is_first:
                logger.info(banner(recipe, specs, manifest.num_samples, topology))
            return Trainer(recipe, run, engines.build(recipe, topology), encoders, stop, end).train(resume)


def _validation_manifest(recipe: Recipe, topology: Topology) -> Manifest | None:
    url = recipe.data.validation_url if recipe.validation else None
    return None if url is None else topology.on_first(lambda: Manifest.load(url))


def require_one_recipe(recipe: Recipe, topology: Topology) -> None:
    """Raise ValueError on every rank unless all have the recipe of the first."""
    first = topology.on_first(lambda: recipe)

    def compare() -> None:
        if changed := differences(first, recipe):
            raise ValueError(f"rank {topology.rank} was started with another recipe than rank 0 ({changed})")

    topology.on_every(compare)


class Trainer:
    """One run: steps, averages, validation, checkpoints, reports."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        engine: Engine,
        encoders: OnlineEncoders | None,
        stop: StopRequest,
        end: Callable[[Exception], object],
    ) -> None:
        self._recipe = recipe
        self._run = run
        self._engine = engine
        self._encoders = encoders
        self._stop = stop
        self._objective = objectives.build(recipe.objective, recipe.model, engine.device)
        self._averages = Averages(engine.shards, recipe.training.ema_rates, recipe.training.ema_power_stds)
        self._topology = engine.topology
        self._watchdog = Watchdog(recipe.training.stall_seconds, run / "stalls", end, engine.topology)
        self._saver = checkpoint.Saver(run, recipe, engine, self._averages, self._watchdog)
        self._skipped = SkippedSteps(run, engine, recipe.training.max_skipped_steps)
        self._telemetry = Telemetry(recipe, engine.topology, self._mark)
        self._images_seen = 0
        self._num_updates = 0  # as many as images seen / batch size, but for steps that were skipped

    def train(self, resume: str = resuming.AUTO) -> int:
        self._resume(resume)
        last_image = self._recipe.training.num_images
        # Any forward pass is progress: a validation is one phase and may take long.
        self._engine.model.register_forward_pre_hook(lambda *_: self._watchdog.mark())
        with (
            Reporter(self._recipe, self._run, self._images_seen, self._telemetry, self._topology) as reporter,
            self._watchdog,
            self._saver,  # the last checkpoint is written before the run ends, however it ends
            self._telemetry.watching_optimizers(),
        ):
            self._telemetry.begin("data")
            for batch in self._batches():
                self._step(batch, reporter)
                done = self._images_seen >= last_image
                stopping = self._agreed_to_stop()
                if self._recipe.validation and (done or self._passed(self._recipe.validation.every_images)):
                    self._telemetry.begin("validation")
                    self._validate(reporter)
                if done or stopping or self._passed(self._recipe.checkpoints.every_images):
                    self._telemetry.begin("checkpoint")
                    self._save()
                if stopping and not done:
                    reporter.say(f"stopped at {self._images_seen} images with a checkpoint; run it again to resume")
                    return INTERRUPTED
                self._telemetry.begin("data")
        return DONE

    def _mark(self, phase: Phase) -> None:
        self._watchdog.mark(self._images_seen // self._recipe.training.batch_size, phase)

    def _resume(self, resume: str) -> None:
        path = resuming.starting_point(resume, self._saver, self._run, self._recipe, self._topology)
        if path is None:
            return
        path, header = checkpoint.load_or_before(path, self._engine, self._averages)
        self._images_seen, self._num_updates = header.images_seen, header.num_steps
        if self._topology.is_first:
            logger.info("resumed from %s", path)

    def _batches(self) -> Iterator[Batch]:
        """This rank's part of every step that is left."""
        recipe = self._recipe
        first_step = self._images_seen // recipe.training.batch_size
        if first_step < recipe.num_steps:
            batch_size, with_noise = recipe.training.batch_size, stream_draws_noise(recipe)
            data = self._topology.data
            loader = Loader(recipe.data, recipe.seed, batch_size, data.rank, data.size, with_noise)
            batches = loader.iterate(first_step)
            for _ in range(first_step, recipe.num_steps):
                yield next(batches)

    def _step(self, batch: Batch, reporter: Reporter) -> None:
        self._telemetry.begin("forward")
        batch_size = self._recipe.training.batch_size
        step = self._images_seen // batch_size
        timestep_B = self._objective.timesteps(batch.timestep_uniform)
        micro_batch_size = self._recipe.training.micro_batch_size or len(batch)
        if self._encoders is not None:
            batch = self._encoders.encode_training(batch, micro_batch_size)
        losses = [
            self._telemetry.timed(self._loss_of(part, part_B))
            for part, part_B in zip(batch.split(micro_batch_size), timestep_B.split(micro_batch_size), strict=True)
        ]
        lr_factor = self._recipe.optimizer.lr_factor(step, self._recipe.num_steps)
        result = self._engine.train_step(losses, lr_factor)
        self._telemetry.count(batch)
        if result.skipped:
            self._skipped.skipped(step, self._images_seen, batch, result)
        else:
            self._skipped.taken()
            self._averages.update(step + 1)
            self._num_updates += 1
        self._images_seen += batch_size
        reporter.step(self._images_seen, timestep_B, result, lr_factor, self._skipped)

    def _loss_of(self, batch: Batch, timestep_B: Tensor) -> LossClosure:
        device = self._engine.device
        return lambda model: self._objective.losses(model, batch.to(device), timestep_B.to(device))

    def _passed(self, every_images: int) -> bool:
        """Whether the step just made reached or crossed a multiple of `every_images`."""
        return self._images_seen % every_images < self._recipe.training.batch_size

    def _agreed_to_stop(self) -> bool:
        """All ranks stop after the same step, whichever of them got the signal."""
        return bool(self._topology.sum(torch.tensor(int(bool(self._stop)))).item())

    def _validate(self, reporter: Reporter) -> None:
        def loss() -> ValidationLoss:
            return validate(self._engine, self._objective, self._recipe, self._encoders)

        reporter.validation(self._images_seen, "raw", loss())
        for name, values in self._averages.by_name().items():
            with base.replaced_weights(self._engine, values):
                reporter.validation(self._images_seen, name, loss())

    def _save(self) -> None:
        self._saver.save(self._images_seen, self._num_updates)
