"""The tasks by name. Lists of prompts are read from a path, never downloaded; what a benchmark must have is checked."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megadit.eval.geneval.judging import IMAGES_PER_PROMPT, PROMPTS_BY_TAG
from megadit.eval.geneval.verdicts import parse_prompt
from megadit.eval.tasks.task import Task, check_count, check_prompt, check_unique, read_list, read_text, require
from megadit.randomness import named_generator
from megadit.recipe import LabelOrder

MJHQ_CATEGORIES = (
    *("animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants", "vehicles"),
)
MJHQ_PROMPTS_PER_CATEGORY = 3000
COCO_PROMPTS = 30_000
IMAGENET_CLASSES, IMAGENET_IMAGES = 1000, 50_000


@dataclass(frozen=True)
class TaskOptions:
    """What tasks can be told. `prompts` is the file of the list, `prompts_sha256` what it must be."""

    prompts: Path | None = None
    prompts_sha256: str | None = None
    images_per_prompt: int | None = None
    labels: LabelOrder | None = None


def load_task(name: str, options: TaskOptions) -> Task:
    """The task called `name`. Raises ValueError for a list that is not what the task says, or missing."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}: there are {', '.join(TASKS)}")
    if options.images_per_prompt is not None and name != "prompts":
        raise ValueError(f"task {name} says itself how many images a prompt gets; --images-per-prompt is for prompts")
    if options.labels is not None and name != "imagenet50k":
        raise ValueError(f"task {name} has no classes; --labels is for imagenet50k")
    task = TASKS[name](options)
    if options.prompts_sha256 is not None and task.sha256 != options.prompts_sha256:
        raise ValueError(f"prompts {options.prompts}: sha256 {task.sha256}, not {options.prompts_sha256}")
    return task


def _geneval(options: TaskOptions) -> Task:
    """GenEval (arXiv 2310.11513): 553 prompts of six tags, four images each."""
    path = require(options.prompts, "geneval", "evaluation_metadata.jsonl of github.com/djghosh13/geneval")
    records, digest = read_list(path)
    tags: Counter[str] = Counter(
        parse_prompt(record, f"{path} line {number}").tag for number, record in enumerate(records, start=1)
    )
    check_count(len(records), sum(PROMPTS_BY_TAG.values()), str(path), "GenEval's list")
    if tags != PROMPTS_BY_TAG:
        found = ", ".join(f"{tag} {tags[tag]}" for tag in PROMPTS_BY_TAG)
        raise ValueError(f"{path} is not GenEval's list: {found}, not {', '.join(map(str, PROMPTS_BY_TAG.values()))}")
    check_unique(records, str(path), "; GenEval's are unique")
    return Task("geneval", 1, records, IMAGES_PER_PROMPT, digest)


def _mjhq(options: TaskOptions) -> Task:
    """MJHQ-30K (playgroundai/MJHQ-30K): meta_data.json {id: {category, prompt}}, 10 categories of 3000."""
    path = require(options.prompts, "mjhq", "meta_data.json of playgroundai/MJHQ-30K")
    data, text = read_text(path)
    try:
        entries = json.loads(text)
        records = [{"prompt": e["prompt"], "category": e["category"], "id": key} for key, e in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not MJHQ-30K's meta_data.json ({{id: {{category, prompt}}}}): {error!r}") from None
    counts = Counter(record["category"] for record in records)
    if counts != dict.fromkeys(MJHQ_CATEGORIES, MJHQ_PROMPTS_PER_CATEGORY):
        found = ", ".join(f"{category} {count}" for category, count in counts.items())
        raise ValueError(
            f"{path} is not MJHQ-30K's meta_data.json: {found or 'empty'}, not {MJHQ_PROMPTS_PER_CATEGORY} of each of "
            f"{', '.join(MJHQ_CATEGORIES)}"
        )
    for record in records:
        check_prompt(record["prompt"], f"{path} id {record['id']}")
    return Task("mjhq", 1, records, 1, hashlib.sha256(data).hexdigest())


def _coco30k(options: TaskOptions) -> Task:
    """30,000 captions of MS-COCO val2014. There is no canonical list: the score is one of this list's SHA-256."""
    path = require(options.prompts, "coco30k", "a .txt, .jsonl or .csv with the 30,000 captions to use; keep it")
    records, digest = read_list(path)
    check_count(len(records), COCO_PROMPTS, str(path), "a list of COCO-30K")
    return Task("coco30k", 1, records, 1, digest)


def _imagenet50k(options: TaskOptions) -> Task:
    """50,000 classes of ImageNet: 50 of each in a fixed order, or drawn uniformly (the protocol of DiT)."""
    if options.prompts is not None:
        raise ValueError("task imagenet50k has classes and takes no --prompts; --labels is balanced or random")
    labels = options.labels or "balanced"
    draws = named_generator(0, f"imagenet50k {labels}")
    if labels == "balanced":
        numbers = torch.randperm(IMAGENET_IMAGES, generator=draws) % IMAGENET_CLASSES
    else:
        numbers = torch.randint(IMAGENET_CLASSES, (IMAGENET_IMAGES,), generator=draws)
    digest = hashlib.sha256(json.dumps(numbers.tolist()).encode()).hexdigest()
    records = [{"prompt": "", "label": number} for number in numbers.tolist()]
    return Task("imagenet50k", 1, records, 1, digest, {"labels": labels, "num_classes": IMAGENET_CLASSES})


def _prompts(options: TaskOptions) -> Task:
    """Any list."""
    path = require(options.prompts, "prompts", 'a .txt with one prompt a line, .jsonl with {"prompt": ...}, or .csv')
    records, digest = read_list(path)
    check_unique(records, str(path), "; for several images of one use --images-per-prompt")
    return Task("prompts", 1, records, options.images_per_prompt or 1, digest)


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "geneval": _geneval,
    "mjhq": _mjhq,
    "coco30k": _coco30k,
    "imagenet50k": _imagenet50k,
    "prompts": _prompts,
}
