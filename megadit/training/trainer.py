"""The training loop. A run is a function of its recipe; the number of images seen says where it is."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
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
from megadit.parametrization.spec import ParamSpec
from megadit.parametrization.table import build_table
from megadit.randomness import seed_of_stage
from megadit.recipe import Recipe, Stage, check_world_size, differences, plan
from megadit.training import checkpoint, from_weights, resuming, run_folder
from megadit.training.data_fits import check_data_fits, require_one_encoding
from megadit.training.ema import Averages
from megadit.training.from_weights import Weights, WeightSource
from megadit.training.online import OnlineEncoders, encoder_dtype, stream_draws_noise
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
    recipe: Recipe,
    run: Path,
    end: Callable[[Exception], object] = end_process,
    resume: str = resuming.AUTO,
    source: WeightSource | None = None,
) -> int:
    """Train to the end or to a stop signal, continuing what `run` holds. Returns the exit status.

    Every rank that a launcher started calls this with the same recipe. `end` is
    called in another thread when the main one hangs, and ends the process. `resume` and `source` say what to begin
    with, see resuming.py and from_weights.py.
    """
    # The watchdog names the rank that hangs; the time-out of the collectives, which would not, must come after it.
    stages = plan(recipe)
    timeout_seconds = max(600, *(2 * stage.recipe.training.stall_seconds for stage in stages))
    sharded = any(stage.recipe.engine.kind != "single" for stage in stages)
    joining = process_group(sharded, timeout_seconds, recipe.engine.num_replicas)
    with joining as topology, stop_on_signal() as stop:
        require_one_recipe(recipe, topology)
        begun = topology.on_first(lambda: resuming.images_begun(run))
        left = [stage for stage in stages if stage.last_image > begun] or list(stages[-1:])
        manifests = _require_possible(left, topology)
        specs = build_table(stages[0].recipe)
        encoders = {left[0].number: _encoders(left[0], topology)}
        topology.on_first(lambda: resuming.check(resume, run, recipe, manifests))
        start = _start_from(source, run, stages[0].recipe, specs, topology)
        with run_folder.owned(run, topology):
            topology.on_first(lambda: run_folder.prepare(run, recipe, specs, manifests, begun))
            if start is not None and source is not None:
                weights, anew = start
                topology.on_first(lambda: from_weights.note(run, source, weights, anew))
            return _train_stages(stages, recipe, run, topology, encoders, stop, end, resume, start)


Start = tuple[Weights, list[str]]  # weights from elsewhere, and which parameters are drawn anew all the same


def _start_from(
    source: WeightSource | None, run: Path, recipe: Recipe, specs: Sequence[ParamSpec], topology: Topology
) -> Start | None:
    """What `source` has, where the run is to begin with it. Raises ValueError on every rank."""
    if not topology.on_first(lambda: from_weights.check(run, source)) or source is None:
        return None
    found: list[Weights] = []
    topology.on_every(lambda: found.append(source.read(recipe)))
    return found[0], from_weights.drawn_anew(found[0], specs, recipe.model, f"--from-weights {source.place}")


def _train_stages(
    stages: Sequence[Stage],
    recipe: Recipe,
    run: Path,
    topology: Topology,
    encoders: dict[int, OnlineEncoders | None],
    stop: StopRequest,
    end: Callable[[Exception], object],
    resume: str,
    start: Start | None,
) -> int:
    """Train what is left, each stage with an engine of its own that begins with the checkpoint of the one before."""
    path = resuming.starting_point(resume, run, recipe, topology)
    seen = topology.on_first(lambda: checkpoint.read_header(path).images_seen if path else 0)
    stage = _stage_at(stages, seen)
    while True:
        _announce(stage, topology)
        found = encoders.pop(stage.number) if stage.number in encoders else _encoders(stage, topology)
        engine = engines.build(stage.recipe, topology.with_replicas(stage.recipe.engine.num_replicas))
        trainer = Trainer(recipe, stage, run, engine, found, stop, end)
        images_seen = trainer.begin(path)
        if path is None and start is not None:
            trainer.begin_with(*start)
        if images_seen < stage.first_image:  # what was newer is damaged
            stage = _stage_at(stages, images_seen)
        else:
            status = trainer.train()
            if status != DONE or stage.is_last:
                return status
            path = resuming.starting_point(resuming.AUTO, run, recipe, topology)
            stage = stages[stage.number + 1]
        del trainer, engine, found  # before the next engine takes memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _stage_at(stages: Sequence[Stage], images_seen: int) -> Stage:
    """The stage that is trained next; the last one where none is left."""
    return next((stage for stage in stages if stage.last_image > images_seen), stages[-1])


def _encoders(stage: Stage, topology: Topology) -> OnlineEncoders | None:
    recipe = stage.recipe
    return OnlineEncoders(recipe.encoders, recipe, topology, stage.number) if recipe.encoders else None


def _announce(stage: Stage, topology: Topology) -> None:
    if topology.is_first:
        specs, manifest = build_table(stage.recipe), Manifest.load(stage.recipe.data.url)
        replicated = topology.with_replicas(stage.recipe.engine.num_replicas)
        logger.info(banner(stage, specs, manifest.num_samples, replicated))


def _require_possible(stages: Sequence[Stage], topology: Topology) -> dict[int, Manifest]:
    """The manifests of the stages' data, by number. Raises ValueError for one that these ranks cannot train."""
    found: dict[int, Manifest] = {}
    for stage in stages:
        recipe = stage.recipe
        check_world_size(recipe, topology.size)
        topology.with_replicas(recipe.engine.num_replicas)
        if recipe.engine.kind == "single" and topology.size > 1:
            raise ValueError(f"engine.kind single runs on one rank, not {topology.size}; use another engine.kind")
        found[stage.number] = topology.on_first(lambda url=recipe.data.url: Manifest.load(url))  # type: ignore[misc]
        check_data_fits(recipe, found[stage.number], _validation_manifest(recipe, topology))
        require_one_encoding(stages[0].recipe, found[stages[0].number], recipe, found[stage.number])
    return found


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
    """One stage of a run: steps, averages, validation, checkpoints, reports. `recipe` is that of the whole run."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        run: Path,
        engine: Engine,
        encoders: OnlineEncoders | None,
        stop: StopRequest,
        end: Callable[[Exception], object],
    ) -> None:
        self._stage = stage
        self._recipe = settings = stage.recipe
        self._run = run
        self._engine = engine
        self._encoders = encoders
        self._stop = stop
        dtype = encoder_dtype(settings)
        self._objective = objectives.build(settings.objective, settings.model, engine.device, dtype)
        self._averages = Averages(engine.shards, settings.training.ema_rates, settings.training.ema_power_stds)
        self._topology = engine.topology
        stall_seconds = settings.training.stall_seconds
        self._watchdog = Watchdog(stall_seconds, run / "stalls", end, engine.topology, stage.number)
        self._saver = checkpoint.Saver(run, recipe, engine, self._averages, self._watchdog, stage)
        self._skipped = SkippedSteps(run, engine, settings.training.max_skipped_steps)
        self._telemetry = Telemetry(settings, engine.topology, self._mark)
        self._images_seen = 0
        self._save_first = False
        self._num_updates = 0  # of the optimizer since its state began: all steps but those that were skipped

    def begin(self, path: Path | None) -> int:
        """Load a checkpoint, or the newest whole one before it; returns how many images it has seen."""
        if path is not None:
            path, header = checkpoint.load_or_before(path, self._engine, self._averages)
            self._images_seen, self._num_updates = header.images_seen, header.num_steps
            if self._topology.is_first:
                logger.info("resumed from %s", path)
            if header.stage < self._stage.number and self._stage.start_from is not None:
                self._start_from(self._stage.start_from)
        return self._images_seen

    def begin_with(self, weights: Weights, anew: Sequence[str]) -> None:
        """Begin with weights from elsewhere, which become the first checkpoint."""
        from_weights.put(weights, self._engine, build_table(self._recipe), anew)
        self._equal_averages()
        self._save_first = True

    def _equal_averages(self) -> None:
        for values in self._averages.by_name().values():
            for name, value in values.items():
                value.copy_(self._engine.shards[name].values)

    def _start_from(self, kind: str) -> None:
        """Go on with one kind of weights alone: every average is a copy of it, and moments begin anew."""
        averages = self._averages.by_name()
        if kind in averages:
            base.write_weights(self._engine, averages[kind])
        self._equal_averages()
        for state in self._engine.optimizer_state().values():
            for slot in state.values():
                slot.zero_()
        self._num_updates = 0
        self._engine.set_num_steps(0)

    def train(self) -> int:
        last_image = self._stage.last_image
        # Any forward pass is progress: a validation is one phase and may take long.
        self._engine.model.register_forward_pre_hook(lambda *_: self._watchdog.mark())
        with (
            Reporter(self._stage, self._run, self._images_seen, self._telemetry, self._topology) as reporter,
            self._watchdog,
            self._saver,  # the last checkpoint is written before the run ends, however it ends
            self._telemetry.watching_optimizers(),
        ):
            if self._save_first:
                self._telemetry.begin("checkpoint")
                self._save()
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
        self._watchdog.mark(self._stage.steps(self._images_seen), phase)

    def _batches(self) -> Iterator[Batch]:
        """This rank's part of every step that is left."""
        recipe = self._recipe
        first_step = self._step_of_stage()
        if first_step < recipe.num_steps:
            batch_size, with_noise = recipe.training.batch_size, stream_draws_noise(recipe)
            data, seed = self._topology.data, seed_of_stage(recipe.seed, self._stage.number)
            with_features = recipe.objective.needs_features is not None
            loader = Loader(recipe.data, seed, batch_size, data.rank, data.size, with_noise, with_features)
            batches = loader.iterate(first_step)
            try:
                for _ in range(first_step, recipe.num_steps):
                    yield next(batches)
            finally:
                batches.close()

    def _step_of_stage(self) -> int:
        return self._stage.steps(self._images_seen) - self._stage.first_step

    def _step(self, batch: Batch, reporter: Reporter) -> None:
        self._telemetry.begin("forward")
        batch_size = self._recipe.training.batch_size
        step = self._stage.steps(self._images_seen)
        timestep_B = self._objective.timesteps(batch.timestep_uniform)
        micro_batch_size = self._recipe.training.micro_batch_size or len(batch)
        if self._encoders is not None:
            batch = self._encoders.encode_training(batch, micro_batch_size)
        losses = [
            self._telemetry.timed(self._loss_of(part, part_B))
            for part, part_B in zip(batch.split(micro_batch_size), timestep_B.split(micro_batch_size), strict=True)
        ]
        lr_factor = self._recipe.optimizer.lr_factor(self._step_of_stage(), self._recipe.num_steps)
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
