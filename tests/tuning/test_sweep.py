"""Sweeps: trials are ordinary runs, each is trained once whatever happens to the sweep, and bad input is said."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from megadit.recipe import Recipe
from megadit.training import run_folder, trainer
from megadit.tuning.curve import Curve
from megadit.tuning.study import Study, Trial
from megadit.tuning.sweep import sweep
from megadit.tuning.trial import fork_server

SHORT = ("validation=null", "training.num_images=96")  # as in conftest.py
SPACE = ("model.width=32,64", "optimizer.lr=2^-7,2^8")
NUM_STEPS = 40  # enough to catch a sweep at them
LONG = ("validation=null", f"training.num_images={16 * NUM_STEPS}")
WORKER = Path(__file__).parents[1] / "workers" / "sweep.py"
SECONDS = 60


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_finished_and_diverged_trials(swept: Path, trials: Callable[[Path], dict[str, Trial]]) -> None:
    found = trials(swept)
    assert sorted(found) == ["width=32,lr=2^-7", "width=32,lr=2^8", "width=64,lr=2^-7", "width=64,lr=2^8"]
    for name, trial in found.items():
        if "2^8" in name:
            assert trial.value is None
            assert trial.pruned is not None
            assert 1 <= trial.pruned.step < 6
            assert re.search(r"the (gradient norm|loss) is (nan|inf|\d)", trial.pruned.reason)
        else:
            assert trial.pruned is None
            assert trial.value == pytest.approx(math.fsum(losses(trial.run)[-2:]) / 2)


def test_a_trial_is_an_ordinary_run(
    swept: Path, trials: Callable[[Path], dict[str, Trial]], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    trial = trials(swept)["width=32,lr=2^-7"]
    recipe = tiny_recipe(*SHORT, "model.width=32", "optimizer.lr=2^-7", "training.max_skipped_steps=1")
    assert run_folder.load_recipe(trial.run).model_dump(exclude={"checkpoints"}) == recipe.model_dump(
        exclude={"checkpoints"}
    )
    trainer.train(recipe, tmp_path / "run")
    assert losses(trial.run) == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def test_optuna_reads_the_study(swept: Path) -> None:
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{swept}/study.db")
    assert [trial.state.name for trial in study.trials].count("PRUNED") == 2
    assert study.best_params["optimizer.lr"] == 2**-7
    assert {trial.params["model.width"] for trial in study.trials} == {32, 64}


def test_what_is_done_is_not_done_again_and_a_grid_can_grow(
    swept: Path, tiny_yaml: Path, num_starts: Callable[[Path], dict[str, int]], tmp_path: Path
) -> None:
    folder = shutil.copytree(swept, tmp_path / "study")
    before = num_starts(folder)
    assert sweep(str(tiny_yaml), folder, SPACE, SHORT) == 0
    assert num_starts(folder) == before
    # Two spellings of what is there, and something new.
    space = ["model.width=32", "optimizer.lr=0.0078125,2**-7,2^-8"]
    assert sweep(str(tiny_yaml), folder, space, SHORT) == 0
    assert num_starts(folder) == before | {"width=32,lr=2^-8": 1}
    assert [search["space"] for search in Study(folder).facts["searches"]] == [list(SPACE), space]


def test_finished_runs_are_values_without_training(
    swept: Path,
    tiny_yaml: Path,
    trials: Callable[[Path], dict[str, Trial]],
    num_starts: Callable[[Path], dict[str, int]],
    tmp_path: Path,
) -> None:
    name = "width=64,lr=2^-7"
    shutil.copytree(swept / "trials" / name, tmp_path / "study" / "trials" / name)
    space = ["model.width=64", "optimizer.lr=2^-7"]
    assert sweep(str(tiny_yaml), tmp_path / "study", space, SHORT) == 0
    assert num_starts(tmp_path / "study") == {name: 1}
    assert trials(tmp_path / "study")[name].value == trials(swept)[name].value

    shutil.copytree(swept / "trials" / name, tmp_path / "other" / "trials" / name)
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(optimizer.weight_decay differ\)"):
        sweep(str(tiny_yaml), tmp_path / "other", space, [*SHORT, "optimizer.weight_decay=0.1"])


# Interruptions


def start(*arguments: Any, **settings: Any) -> BaseProcess:
    """A sweep in a process of its own."""
    given = {"arguments": arguments, "settings": settings}
    process = fork_server().Process(target=runpy.run_path, args=(str(WORKER), given))
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def has_steps(run: Path, number: int) -> bool:
    return (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= number


def check_steps(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))


def test_a_trial_is_in_one_hand(swept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(swept, tmp_path / "study")
    ours, theirs = Study(folder), Study(folder)
    ours.add([("seed=1",)], {})
    trial = theirs.trials()[-1]
    assert trial.name == "seed=1"
    claim = ours.claim(trial)
    assert claim is not None
    assert theirs.claim(trial) is None
    claim.release()
    claim = theirs.claim(trial)
    assert claim is not None
    claim.finish(0.5)
    claim.release()
    assert ours.claim(trial) is None
    assert ours.is_done(trial)


@pytest.mark.slow
def test_sweeps_share_the_trials_of_a_study(
    tiny_yaml: Path, tmp_path: Path, num_starts: Callable[[Path], dict[str, int]]
) -> None:
    arguments = (str(tiny_yaml), tmp_path / "study", ["seed=0,1,2"], SHORT)
    other = start(*arguments)
    wait_for(lambda: bool(num_starts(tmp_path / "study")))  # it is at the first
    assert sweep(*arguments) == 0
    other.join(SECONDS)
    assert other.exitcode == 0
    assert num_starts(tmp_path / "study") == {f"seed={seed}": 1 for seed in range(3)}
    assert all(trial.value is not None for trial in Study(tmp_path / "study").trials())


def test_the_trial_of_a_sweep_that_was_killed_is_taken_up(
    tiny_yaml: Path, tmp_path: Path, num_starts: Callable[[Path], dict[str, int]]
) -> None:
    folder = tmp_path / "study"
    arguments = (str(tiny_yaml), folder, ["model.width=32"], LONG)
    run = folder / "trials" / "width=32"
    killed = start(*arguments)
    wait_for(lambda: has_steps(run, 3))
    killed.kill()
    assert sweep(*arguments) == 0
    assert num_starts(folder) == {run.name: 2}
    assert "resumed from" in (run / "log.txt").read_text()  # the trial outlived its sweep for a checkpoint
    check_steps(run)
    assert [trial.value for trial in Study(folder).trials()] == [pytest.approx(math.fsum(losses(run)[-8:]) / 8)]


def test_an_interrupted_sweep_leaves_checkpoints_and_resumes(
    tiny_yaml: Path, tmp_path: Path, num_starts: Callable[[Path], dict[str, int]]
) -> None:
    folder = tmp_path / "study"
    arguments = (str(tiny_yaml), folder, ["model.width=32"], LONG)
    run = folder / "trials" / "width=32"

    def interrupt() -> None:
        wait_for(lambda: has_steps(run, 3))
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the sweep be over before the signal
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(interrupt)
            assert sweep(*arguments) == 75
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert list((run / "checkpoints").iterdir())
    assert not Study(folder).trials()[0].done
    assert sweep(*arguments) == 0
    assert num_starts(folder) == {run.name: 2}
    assert "resumed from" in (run / "log.txt").read_text()
    check_steps(run)


# Metrics


def test_the_weight_of_a_loss_is_no_part_of_what_is_compared(tiny_yaml: Path, tmp_path: Path, repa: list[str]) -> None:
    """Weights of REPA: the losses are far apart, as they contain the weight, and the velocities next to each other."""
    space = ["objective.repa.weight=0.1,0.5,2.0"]
    overrides = [*repa, "validation=null", "training.num_images=2560"]
    assert sweep(str(tiny_yaml), tmp_path / "study", space, overrides, num_workers=2) == 0
    study = Study(tmp_path / "study")
    assert study.metric == "training/velocity"
    velocities, sums = [], []
    for trial in study.trials():
        curve = Curve.read(trial.run)
        assert trial.value == curve.value(trial.recipe, "training/velocity")
        velocities.append(trial.value)
        sums.append(curve.value(trial.recipe, "training/loss"))
    assert max(velocities) < 1.05 * min(velocities)
    assert sums[0] > 0.2 and abs(sums[1]) < 0.2 and sums[2] < -1


def test_a_study_from_before_metrics_had_names_compares_the_sum(swept: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(swept, tmp_path / "study")
    facts = yaml.safe_load((folder / "study.yaml").read_text()) | {"version": 1, "metric": "training"}
    (folder / "study.yaml").write_text(yaml.safe_dump(facts))
    assert Study(folder).metric == "training/loss"
    with pytest.raises(ValueError, match="metric: training/loss there, training/velocity now"):
        sweep(str(tiny_yaml), folder, SPACE, SHORT)
    assert sweep(str(tiny_yaml), folder, [*SPACE[:1], "optimizer.lr=2^-7"], SHORT, metric="training/loss") == 0
    assert len(Study(folder).trials()) == 4


# Bad input


@pytest.mark.parametrize(
    ("space", "overrides", "settings", "message"),
    [
        (["model.widht=32"], [], {}, "unknown key 'model.widht'; did you mean 'width'?"),
        (["model.width=32,40"], [], {}, "width 40 must be a multiple of head_dim 16"),
        (["optimizer.lr=0.1,fast"], [], {}, "optimizer.lr = 'fast': Input should be a valid number"),
        (["model.text_dim=384,100"], [], {}, "model.text_dim is 100, the data has 384"),
        (["parametrization.base_width=32,24"], [], {}, "base_width 24 must be a multiple of model.head_dim 16"),
        (["seed=0"], ["data.url=file:///nowhere"], {}, "no data set at file:///nowhere"),
        (["seed=0"], ["validation=null"], {"metric": "validation"}, "needs a recipe with a validation section"),
        (
            ["seed=0"],
            [],
            {"metric": "training/noise"},
            "no metric 'training/noise': objective.kind flow has training/vel",
        ),
        (["seed=0"], [], {"num_trials": 3}, "a grid has as many trials as it has points"),
        (["seed=0"], [], {"sampler": "random"}, "random search needs a number of trials"),
        (["optimizer.max_grad_norm=0.1..9"], [], {}, "a grid needs a list"),
    ],
)
def test_bad_input_is_said_before_anything_is_made(
    tiny_yaml: Path, tmp_path: Path, space: list[str], overrides: list[str], settings: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep(str(tiny_yaml), tmp_path / "study", space, overrides, **settings)
    assert not (tmp_path / "study").exists()


def test_a_study_is_of_one_recipe_metric_and_data(
    swept: Path, tiny_yaml: Path, packed: Path, pack_animals: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"something else \(optimizer.weight_decay: 0.01 there, 0.1 now\)"):
        sweep(str(tiny_yaml), swept, SPACE, [*SHORT, "optimizer.weight_decay=0.1"])
    with pytest.raises(ValueError, match="metric: training/velocity there, training/loss now"):
        sweep(str(tiny_yaml), swept, SPACE, SHORT, metric="training/loss")
    with pytest.raises(ValueError, match="metric: training/velocity there, validation/velocity now"):
        sweep(str(tiny_yaml), swept, SPACE, ["training.num_images=96"], metric="validation")
    pack_animals(str(tmp_path), seed=4)
    with pytest.raises(ValueError, match="data: fingerprint [0-9a-f]{12} there, [0-9a-f]{12} now"):
        sweep(str(tiny_yaml), swept, SPACE, [*SHORT, f"data.url=file://{tmp_path}/train"])


def test_a_trial_that_fails_by_itself_stops_the_sweep(tiny_yaml: Path, packed: Path, tmp_path: Path) -> None:
    data = shutil.copytree(packed, tmp_path / "data")
    for shard in (data / "train").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    overrides = [*SHORT, f"data.url=file://{data}/train"]
    with pytest.raises(ValueError, match=r"trial seed=0: .*\.tar.*log\.txt"):
        sweep(str(tiny_yaml), tmp_path / "study", ["seed=0"], overrides)
    assert not Study(tmp_path / "study").trials()[0].done


def test_a_sweep_is_not_a_rank(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a sweep is not a rank"):
        sweep(str(tiny_yaml), tmp_path / "study", ["seed=0"])
