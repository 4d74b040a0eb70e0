"""Tars shaped like SA-1B's (arXiv 2304.02643), of crops of real photographs: for tests, benchmarks, a first look.

sa_000000.tar ...   ./sa_<id>.jpg and ./sa_<id>.json, with SA-1B's image{...} and annotations[{...}]
captions.jsonl      {"key": "sa_<id>", "caption": "..."}
checklist.chk       md5 and name of each tar

Without `--photos` the photograph is the one that matplotlib carries; a crop that has to be enlarged gets grain, or its
file would be a third of the size of SA-1B's. Masks are ellipses. The same arguments give the same bytes.

    python -m megadit.data.sa1b_like /data/sa1b-like --num 96 --samples-per-tar 24 --short-side 1500
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from megadit.data.storage import open_store
from megadit.randomness import Purpose, generator

ASPECT_RATIOS = (1.0, 5 / 4, 4 / 3, 1.5, 16 / 9, 2.0)  # long side over short side; half of the pictures stand upright
QUALITY = 88
GRAIN = 6.0  # standard deviation, of 255
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Photo:
    """A photograph, uint8 [H, W, 3], and what to call it in captions."""

    name: str
    pixels: np.ndarray


def make(
    out: str,
    num_samples: int,
    *,
    samples_per_tar: int = 8,
    short_side: int = 256,
    num_masks: int = 8,
    photos: Path | None = None,
    seed: int = 0,
) -> None:
    """Write the files above to `out` (s3://bucket/prefix, file:///folder or a path).

    short_side: of every picture, in pixels (SA-1B: 1500); num_masks: of every picture (SA-1B: about 100).
    Raises ValueError for a folder without photographs, StorageError.
    """
    sources, store = load_photos(photos), open_store(out)
    captions, checklist = [], []
    for number, start in enumerate(range(0, num_samples, samples_per_tar)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for image_id in range(start + 1, min(start + samples_per_tar, num_samples) + 1):
                key = f"sa_{image_id}"
                picture, caption = _crop(sources, image_id, short_side, seed)
                _add(tar, f"./{key}.jpg", _encode(picture))
                record = annotate(image_id, *picture.size, num_masks, seed)
                _add(tar, f"./{key}.json", json.dumps(record).encode())
                captions.append(json.dumps({"key": key, "caption": caption}) + "\n")
        name = f"sa_{number:06d}.tar"
        store.put(name, buffer.getvalue())
        checklist.append(f"{hashlib.md5(buffer.getvalue(), usedforsecurity=False).hexdigest()}  {name}\n")
    store.put("captions.jsonl", "".join(captions).encode())
    store.put("checklist.chk", "".join(checklist).encode())


def load_photos(folder: Path | None) -> list[Photo]:
    """The photographs of a folder by name, or the one of matplotlib. Raises ValueError when there is none."""
    if folder is None:
        paths = [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: no photographs there ({', '.join(sorted(PHOTO_SUFFIXES))})")
    found = []
    for path in paths:
        with Image.open(path) as picture:
            found.append(Photo(path.stem.replace("_", " "), np.array(picture.convert("RGB"))))
    return found


def annotate(image_id: int, width: int, height: int, num_masks: int, seed: int) -> dict[str, Any]:
    """SA-1B's JSON of a picture: elliptic masks as COCO's run lengths, boxes as x, y, width, height in pixels."""
    draws = generator(seed, Purpose.PACKING, image_id, 1)
    annotations = []
    for number in range(num_masks):
        center_x, center_y, radius_x, radius_y = draws.uniform([0.2, 0.2, 0.05, 0.05], [0.8, 0.8, 0.2, 0.2])
        columns = np.arange(int((center_x - radius_x) * width) + 1, int((center_x + radius_x) * width))
        half = radius_y * height * np.sqrt(1 - ((columns / width - center_x) / radius_x) ** 2)
        tops = np.ceil(center_y * height - half).astype(np.int64)
        lengths = np.floor(center_y * height + half).astype(np.int64) - tops + 1
        columns, tops, lengths = (values[lengths > 0] for values in (columns, tops, lengths))
        annotations.append(
            {
                "bbox": [int(columns[0]), int(tops.min()), len(columns) - 1, int(lengths.max()) - 1],
                "area": int(lengths.sum()),
                "segmentation": {"size": [height, width], "counts": encode_runs(columns, tops, lengths, height, width)},
                "predicted_iou": round(float(draws.uniform(0.88, 1.0)), 6),
                "point_coords": [[float(center_x * width), float(center_y * height)]],
                "crop_box": [0, 0, width, height],
                "id": image_id * 1000 + number,
                "stability_score": round(float(draws.uniform(0.92, 1.0)), 6),
            }
        )
    image = {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"}
    return {"image": image, "annotations": annotations}


def encode_runs(columns: np.ndarray, tops: np.ndarray, lengths: np.ndarray, height: int, width: int) -> str:
    """A mask of one run in each of `columns` (int64 [n], rising), in pycocotools' compressed run lengths.

    Runs are counted down the columns, zeros first; each count but the first three is a difference to the one before the
    last, in groups of five bits (cocoapi, common/maskApi.c, rleToString).
    """
    starts = columns * height + tops
    edges = np.stack([starts, starts + lengths], axis=1).reshape(-1)
    counts = np.diff(edges, prepend=0).tolist()
    if edges[-1] < height * width:
        counts.append(int(height * width - edges[-1]))
    text = bytearray()
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != (-1 if bits & 0x10 else 0)
            text.append((bits | 0x20 if more else bits) + 48)
    return text.decode()


def _crop(photos: Sequence[Photo], image_id: int, short_side: int, seed: int) -> tuple[Image.Image, str]:
    draws = generator(seed, Purpose.PACKING, image_id, 0)
    photo = photos[int(draws.integers(len(photos)))]
    ratio, upright = ASPECT_RATIOS[int(draws.integers(len(ASPECT_RATIOS)))], bool(draws.integers(2))
    long_side = round(short_side * ratio)
    width, height = (short_side, long_side) if upright else (long_side, short_side)
    limit = min(photo.pixels.shape[1] / width, photo.pixels.shape[0] / height)
    scale = float(draws.uniform(0.6, 1.0)) * limit  # pixels of the photograph for one of the crop
    left = float(draws.uniform(0, photo.pixels.shape[1] - scale * width))
    top = float(draws.uniform(0, photo.pixels.shape[0] - scale * height))
    box = (left, top, left + scale * width, top + scale * height)
    crop = Image.fromarray(photo.pixels).resize((width, height), Image.Resampling.BICUBIC, box=box)
    if scale < 1:
        grain = draws.standard_normal((height, width, 1), dtype=np.float32) * GRAIN
        crop = Image.fromarray(np.clip(np.asarray(crop) + grain, 0, 255).astype(np.uint8))
    shape = "square" if ratio == 1 else "tall" if upright else "wide"
    return crop, f"a photograph of {photo.name}, a {shape} crop of {width} by {height} pixels"


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and mode keep their constant defaults
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def main() -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(
        prog="python -m megadit.data.sa1b_like",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", help="s3://bucket/prefix or a folder")
    parser.add_argument("--num", type=int, default=96, help="pictures")
    parser.add_argument("--samples-per-tar", type=int, default=24)
    parser.add_argument("--short-side", type=int, default=1500, help="of each picture, in pixels")
    parser.add_argument("--masks", type=int, default=64, help="of each picture")
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = {"short_side": args.short_side, "num_masks": args.masks, "photos": args.photos, "seed": args.seed}
    try:
        make(args.out, args.num, samples_per_tar=args.samples_per_tar, **settings)
    except ValueError as error:
        sys.stderr.write(f"megadit: error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
