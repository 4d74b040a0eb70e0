"""GenEval's numbers from judged images, and the file that its own summary_scores.py reads."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadit.eval.geneval.rows import Row
from megadit.eval.geneval.verdicts import TAGS
from megadit.eval.units import Unit

NUM_BOOTSTRAPS = 2000
BOOTSTRAP_SEED = 0


def summarise(rows: Sequence[Row], tags: Sequence[str]) -> dict[str, Any]:
    """The score of the images: `rows` of all, `tags` by prompt number; every prompt has the same number of images.

    value: the mean over tags of the share of correct images, which is GenEval's overall score and not the share over
    all images. groups: that share by tag. images_correct: over all images; prompts_correct: prompts with at least one
    correct image. stderr and groups_stderr: standard deviations over resampled prompts, tag by tag (bootstrap).
    """
    by_prompt: dict[int, list[bool]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row["correct"])
    shares = {
        tag: np.array([np.mean(correct) for prompt, correct in by_prompt.items() if tags[prompt] == tag])
        for tag in TAGS
        if tag in tags
    }
    resampled = {tag: _bootstrap(of_prompts) for tag, of_prompts in shares.items()}
    groups = {tag: float(of_prompts.mean()) for tag, of_prompts in shares.items()}
    return {
        "value": float(np.mean(list(groups.values()))),
        "stderr": float(np.mean(list(resampled.values()), axis=0).std()),
        "n": len(rows),
        "groups": groups,
        "groups_stderr": {tag: float(means.std()) for tag, means in resampled.items()},
        "images_correct": float(np.mean([row["correct"] for row in rows])),
        "prompts_correct": float(np.mean([any(correct) for correct in by_prompt.values()])),
    }


def _bootstrap(of_prompts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of as many prompts drawn with replacement, NUM_BOOTSTRAPS times."""
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(len(of_prompts), size=(NUM_BOOTSTRAPS, len(of_prompts)))
    return of_prompts[draws].mean(axis=1)


def results_line(row: Row, unit: Unit, metadata: Mapping[str, Any]) -> str:
    """A line of GenEval's results.jsonl; `metadata` is the prompt's line of evaluation_metadata.jsonl."""
    result = {
        "filename": str(unit.path),
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": row["correct"],
        "reason": row["reason"],
        "metadata": json.dumps(metadata),
        "details": json.dumps(row["details"]),
    }
    return json.dumps(result) + "\n"
