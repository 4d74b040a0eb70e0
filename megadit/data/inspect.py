"""What is in a data set, and whether all of it is what the manifest says."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megadit.data.bars import Bars, Tally, no_bars
from megadit.data.format.manifest import TEXT, Manifest
from megadit.data.format.members import DataSet, ShardFile
from megadit.data.storage import ChangedError, MissingError
from megadit.data.storage.object_file import ObjectFile

NPY_HEADER_BYTES = 128  # of a small array, as numpy writes it
CAPTIONS_READ = 512
PROBLEMS_NAMED = 5  # of one file
BAR = 40


@dataclass(frozen=True)
class Quantiles:
    """Least, median, 99th percentile and greatest."""

    least: int
    median: int
    high: int
    most: int

    @staticmethod
    def of(values: np.ndarray) -> "Quantiles":
        """Of integers [N], N at least 1."""
        return Quantiles(*(int(value) for value in np.percentile(values, [0, 50, 99, 100], method="nearest")))


@dataclass(frozen=True)
class Stats:
    """What `stats` counts. Histograms map a name to a number of samples, in the order of the names.

    member_bytes: of all samples, by kind. buckets: of packed sets. aspect_ratios: height over width, of raw ones, in
    steps of a factor of 2^(1/4); short_sides: in pixels. characters: of CAPTIONS_READ captions, evenly spaced. tokens:
    of the stored text features. labels: by class.
    """

    manifest: Manifest
    member_bytes: dict[str, int]
    buckets: dict[str, int]
    aspect_ratios: dict[str, int]
    short_sides: Quantiles | None
    characters: Quantiles | None
    tokens: Quantiles | None
    labels: dict[str, int]


def stats(url: str) -> Stats:
    """Count what is in the data set at `url`, by its index and some captions. Raises ManifestError, StorageError."""
    data = DataSet(url)
    manifest, index = data.manifest, data.index
    buckets: Counter[str] = Counter()
    for shard in manifest.shards:
        if shard.bucket:
            buckets[shard.bucket] += shard.num_samples
    with ThreadPoolExecutor(8) as pool:
        evenly = np.linspace(0, manifest.num_samples - 1, CAPTIONS_READ).round().astype(np.int64)
        captions = list(pool.map(data.caption, np.unique(evenly).tolist()))
    characters = np.array([len(caption) for caption in captions if caption is not None])
    tokens = None
    if manifest.text:
        row_bytes = manifest.text.dim * np.dtype(manifest.text.dtype).itemsize
        tokens = Quantiles.of((index.places[TEXT]["size"].astype(np.int64) - NPY_HEADER_BYTES) // row_bytes)
    labels = np.bincount(index.labels, minlength=len(manifest.labels)).tolist() if index.labels is not None else []
    return Stats(
        manifest=manifest,
        member_bytes={kind: int(index.places[kind]["size"].sum(dtype=np.int64)) for kind in manifest.members},
        buckets={name: buckets[name] for name in manifest.buckets()},
        aspect_ratios={} if index.sizes is None else _aspect_ratios(index.sizes),
        short_sides=None if index.sizes is None else Quantiles.of(index.sizes.min(axis=1)),
        characters=Quantiles.of(characters) if len(characters) else None,
        tokens=tokens,
        labels=dict(zip(manifest.labels, labels, strict=True)),
    )


def format_stats(found: Stats) -> str:
    """The lines of `megadit data stats`."""
    manifest, lines = found.manifest, []
    in_tars = sum(shard.num_bytes for shard in manifest.shards)
    lines.append(
        f"{manifest.name}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards, {_size(in_tars)}"
    )
    if manifest.root:
        lines.append(f"shards at {manifest.root}")
    lines.append(f"fingerprint {manifest.fingerprint}")
    for reason, count in sorted(manifest.left_out.items()):
        lines.append(f"left out: {count:,} ({reason})")
    lines += ["", "member, of each sample on average"]
    for kind, num_bytes in found.member_bytes.items():
        lines.append(f"  {kind:<16} {_size(num_bytes / manifest.num_samples)}")
    lines += _histogram("bucket, height x width", found.buckets)
    lines += _histogram("aspect ratio, height / width", found.aspect_ratios)
    lines += _histogram("class", found.labels)
    quantiles = {
        "short side of the pictures, pixels": found.short_sides,
        f"caption, characters (of at most {CAPTIONS_READ})": found.characters,
        "caption, tokens of its features": found.tokens,
    }
    for title, values in quantiles.items():
        if values:
            lines += ["", title]
            lines.append(f"  least {values.least}, median {values.median}, 99 % {values.high}, most {values.most}")
    return "\n".join(lines)


def verify(
    url: str,
    sample_share: float = 1.0,
    workers: int = 4,
    bars: Bars = no_bars,
) -> list[str]:
    """Read the members of a share of the samples and compare them with the index; what is wrong, one line each.

    Of whole tars their ETag and size are compared, too, and their sha256 where the manifest states it and all is read.
    Raises ValueError for a share that is not in (0, 1], ManifestError and StorageError: also where a file cannot be
    read at all for now.
    """
    if not 0 < sample_share <= 1:
        raise ValueError(f"sample share {sample_share} must be above 0 and at most 1")
    data = DataSet(url)
    with bars("verifying") as advance, ThreadPoolExecutor(workers, thread_name_prefix="megadit-verify") as pool:
        tally = Tally(advance, len(data.files))

        def check(file: ShardFile) -> list[str]:
            problems = _check_file(data, file, sample_share)
            tally.add(1)
            return problems

        return [problem for problems in pool.map(check, data.files) for problem in problems]


def _check_file(data: DataSet, file: ShardFile, share: float) -> list[str]:
    stated = file.shard.sha256 if file.is_tar and share == 1 else None
    digest = hashlib.sha256()
    wrong: list[str] = []
    try:
        reader = ObjectFile(file.store, file.name, digest.update if stated else None, file.etag)
        for member in data.members_of(file, share):
            if not member.is_sound(reader.blocks(member.offset, member.end)):
                wrong.append(member.fault(file, data.key(member.row), "CRC-32 differs"))
        if stated:
            reader.finish()
    except MissingError as error:
        return [str(error)]
    except ChangedError:
        return [f"{file.url} is newer than the index: its ETag is another one; run `megadit data index` again"]
    problems = wrong[:PROBLEMS_NAMED]
    if len(wrong) > PROBLEMS_NAMED:
        problems.append(f"{file.url}: {len(wrong) - PROBLEMS_NAMED} more members: CRC-32 differs")
    if file.is_tar and reader.size != file.shard.num_bytes:
        problems.append(f"{file.url} has {reader.size} bytes, the manifest says {file.shard.num_bytes}")
    if stated and digest.hexdigest() != stated:
        problems.append(f"{file.url}: sha256 differs")
    return problems


def _aspect_ratios(sizes: np.ndarray) -> dict[str, int]:
    steps = np.round(4 * np.log2(sizes[:, 0] / sizes[:, 1])).astype(np.int64)
    found, counts = np.unique(steps, return_counts=True)
    return {f"{2 ** (step / 4):.2f}": int(count) for step, count in zip(found.tolist(), counts, strict=True)}


def _histogram(title: str, counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    most, width = max(counts.values()), max(map(len, counts))
    bars = [f"  {name:<{width}} {count:>12,} {'#' * -(-BAR * count // most)}" for name, count in counts.items()]
    return ["", title, *bars]


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"
