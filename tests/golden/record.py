"""The first 20 steps of shipped recipes of CPU size, through the command line: loss and gradient norm of each step.

`python -P tests/golden/record.py tests/golden/losses.json` writes what tests/test_golden_losses.py compares with.
Only a change that means to change the arithmetic writes it anew, and its commit says why.

A recipe is shortened by `training.num_images`, has its top level alone, and is otherwise what ships: one process, its
own batch, the data that its first lines name. Products and sums take the code paths of AVX2, and of MKL those that are
the same on every CPU: with them, one and two threads give the same bits. The CPU's own paths (AVX512) move losses by
up to 6e-6 in 20 steps, mostly through the encoded captions, and gradient norms by up to 3e-5; those of SSE, 4e-6 on the
same captions.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_STEPS = 20
COLUMNS = ("loss", "grad_norm")
CODE_PATHS = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
}


def record(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Pack the shipped pictures into `folder` and train there: {"made": how, "curves": {recipe: {column: [step]}}}."""
    import torch

    from megadit.cli import app
    from megadit.recipe import RECIPE_FOLDER, load

    def megadit(*arguments: str) -> None:
        app(arguments, standalone_mode=False)

    data = f"{folder}/emoji-12"
    megadit("data", "pack", "emoji", data, "--size", "12", "--label", "subgroup", "--where", "skin_tone=false")
    urls = [f"data.url={data}/train", f"data.validation_url={data}/validation"]
    curves = {}
    for name in names or sorted(path.stem for path in RECIPE_FOLDER.glob("*-cpu.yaml")):
        num_images, run = NUM_STEPS * load(name).training.batch_size, folder / name
        changes = [f"training.num_images={num_images}", "training.log_every_steps=1", "validation=null", "stages=[]"]
        megadit("train", name, *urls, *changes, "--run", str(run))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "train"]
        curves[name] = {column: [step[column] for step in steps] for column in COLUMNS}
    made = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), **CODE_PATHS}
    return {"made": made, "curves": curves}


def main(target: Path, *names: str) -> None:
    if any(os.environ.get(name) != value for name, value in CODE_PATHS.items()):  # read when libraries are loaded
        os.execve(sys.executable, [sys.executable, "-P", *sys.argv], os.environ | CODE_PATHS)
    with tempfile.TemporaryDirectory() as folder:
        target.write_text(json.dumps(record(Path(folder), names), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
