"""`megadit quickstart`: the whole path on one machine, by the commands that a user would give."""

import os
import shlex
import sys
from pathlib import Path

from megadit.data.storage.local_s3 import LocalS3
from megadit.exit_codes import DONE, INTERRUPTED
from megadit.launcher.processes import run as run_child
from megadit.recipe import load

PROMPTS = (  # "yellow heart" and "red circle" are held out from training by the packer
    *("red heart", "green heart", "blue heart", "yellow heart", "yellow circle"),
    *("blue circle", "red circle", "orange square", "purple square", "brown square"),
    *("red apple", "green apple", "lemon", "grapes", "full moon"),
    *("grinning face", "smiling face with sunglasses", "evergreen tree", "police car", "flag: France"),
)


def quickstart(run: Path) -> int:
    """Pack, train, sample and draw the loss curve in the folder `run`; returns the first exit code that is not 0.

    Interrupted, it leaves a checkpoint; called again, it skips what is done and resumes.
    """
    recipe = load("quickstart")
    destination = recipe.data.url.removesuffix("/train")
    samples, curve = run / "samples.png", run / "loss.png"
    pack = ["data", "pack", "emoji", destination, "--size", str(recipe.model.input_size), "--where", "skin_tone=false"]
    train = ["train", "quickstart", "--run", str(run)]
    draw = ["sample", str(run), "--grid", str(samples)] + [word for text in PROMPTS for word in ("--prompt", text)]

    with LocalS3(run / "s3") as server:
        print(f"a local S3 server listens at {server.endpoint} and keeps its objects in {run / 's3'}")
        server.create_bucket(destination.removeprefix("s3://").split("/")[0])
        for command in (pack, train):
            if code := _megadit(command, server.environment):
                if code == INTERRUPTED:
                    print(f"the checkpoint is in {run / 'checkpoints'}; the same command goes on from there")
                return code
    if code := _megadit(draw, {}):
        return code
    from megadit.eval.curves import draw as draw_curve

    draw_curve(run, curve)
    print(_closing_words(run, samples, curve))
    return DONE


def _megadit(arguments: list[str], environment: dict[str, str]) -> int:
    shown = [word for word in arguments if word != "--prompt" and word not in PROMPTS]
    print(f"\n$ megadit {shlex.join(shown)}", flush=True)
    return run_child([sys.executable, "-m", "megadit", *arguments], environment)


def _closing_words(run: Path, samples: Path, curve: Path) -> str:
    megadit = os.path.relpath(Path(sys.executable).parent / "megadit")
    return f"""
samples     {samples}
loss curve  {curve}
checkpoint  {run / "checkpoints"}

What to try next:
  {megadit} sample {run} --prompt "green apple" --prompt "smiling cat" --grid {run / "more.png"}
  {megadit} eval quickstart {run}       # scores both checkpoints and writes a page about them; several minutes
  {megadit} recipe show quickstart                  # the recipe and its muP parameter table
  {megadit} data serve {run / "s3"}        # the data again; in another terminal, paste the lines it prints and
  {megadit} train quickstart engine.kind=zero3 --run runs/zero3   # get the same curve from DeepSpeed ZeRO-3"""
