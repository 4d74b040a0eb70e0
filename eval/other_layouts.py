"""Folders in the layouts of others: generated images for GenEval's tools, a packed data set as pictures and prompts."""

import json
from dataclasses import dataclass
from pathlib import Path

from megadit.data.format.members import DataSet
from megadit.eval import units
from megadit.files import write_bytes, write_text


@dataclass(frozen=True)
class Exported:
    """Where the pictures of a data set and the list of its captions are."""

    images: Path
    prompts: Path


def export_data(url: str, out: Path) -> Exported:
    """Write the pictures of a packed data set and its captions, each once, as a list of task prompts.

    OUT/images/KEY.EXT are the packed bytes, so that a metric compares with what the model was trained on;
    OUT/prompts.jsonl is written last, and a folder that has it is left as it is. Raises ValueError for no data set, and
    for one without pictures or captions.
    """
    found = Exported(out / "images", out / "prompts.jsonl")
    if found.prompts.is_file():
        return found
    data = DataSet(url)
    facts = data.manifest.image
    if facts is None or facts.resize is None:
        raise ValueError(f"{url} has no packed pictures: pack it with --keep-pictures")
    captions: dict[str, str] = {}
    for sample in range(data.manifest.num_samples):
        key, caption = data.key(sample), data.caption(sample)
        if caption is None:
            raise ValueError(f"{url} has no captions to make prompts of")
        write_bytes(found.images / f"{key}.{facts.member}", data.get(facts.member, sample))
        captions.setdefault(caption, key)
    lines = [json.dumps({"prompt": caption, "key": key}) + "\n" for caption, key in captions.items()]
    write_text(found.prompts, "".join(lines))
    return found


def export_geneval(folder: Path, out: Path) -> int:
    """Write a complete folder of task geneval in GenEval's own layout, for other tools; the number of prompts.

    OUT/00000/metadata.jsonl (one line, the prompt's), OUT/00000/samples/00000.png to 00003.png.
    """
    manifest = units.read_manifest(folder)
    if manifest["task"]["id"] != "geneval":
        raise ValueError(f"{folder} is of task {manifest['task']['id']}, not geneval: its prompts have no metadata")
    images = units.complete(folder)
    prompts = units.read_prompts(folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give a new folder")
    for index, record in enumerate(prompts):
        metadata = {key: value for key, value in record.items() if key != "index"}
        write_text(out / f"{index:05d}" / "metadata.jsonl", json.dumps(metadata) + "\n")
    for unit in images:
        path = out / f"{unit.prompt:05d}" / "samples" / f"{unit.image:05d}.png"
        write_bytes(path, unit.path.read_bytes())
    return len(prompts)
