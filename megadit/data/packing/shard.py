"""One shard: its tar, and the record that says what is in it.

The record is written after the tar, as <destination>/<split>/shards/<name>.json, so a shard with a record is whole.
Records let a pack go on where it broke, and let ranks share one; the index is made of them.
"""

import hashlib
import io
import logging
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from megadit import checksums
from megadit.data.format.manifest import ShardFacts
from megadit.data.packing.encoding import Encoding
from megadit.data.packing.pixels import fit
from megadit.data.packing.plan import ShardPlan
from megadit.data.packing.source import Source, SourceError, SourceSample
from megadit.data.storage import Store

log = logging.getLogger(__name__)

TAR_PREFIX_BYTES = tarfile.BLOCKSIZE  # a ustar member has one header block before its data
SLICE_SAMPLES = 64  # read, decoded and encoded together; the next ones are read meanwhile
Loaded = tuple[list[SourceSample], list[Image.Image], list[int], list[str]]  # with numbers; what cannot be decoded


class ShardRecord(BaseModel):
    """What is in a shard. `plan` is the digest of its plan; samples: their numbers in the source, in order.

    places: kind -> (offset, size, crc32) of each sample. broken: keys of the pictures that cannot be decoded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    shard: ShardFacts
    samples: tuple[int, ...]
    keys: tuple[str, ...]
    places: dict[str, tuple[tuple[int, int, int], ...]]
    broken: tuple[str, ...]


def build_shard(source: Source, plan: ShardPlan, encoding: Encoding, inputs: str) -> tuple[bytes, ShardRecord]:
    """The tar and the record of a shard. Raises PackError, SourceError, StorageError."""
    buffer = io.BytesIO()
    keys: list[str] = []
    numbers: list[int] = []
    broken: list[str] = []
    places: dict[str, list[tuple[int, int, int]]] = {kind: [] for kind in encoding.members}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for samples, pictures, sound, unsound in _load(source, plan):
            for sample, members in zip(samples, encoding.encode(samples, pictures, sound), strict=True):
                for kind, data in members.items():
                    info = tarfile.TarInfo(f"{sample.key}.{kind}")  # time, owner and mode keep their constant defaults
                    info.size = len(data)
                    places[kind].append((tar.offset + TAR_PREFIX_BYTES, len(data), checksums.crc32(data)))
                    tar.addfile(info, io.BytesIO(data))
            keys += [sample.key for sample in samples]
            numbers += sound
            broken += unsound
    tar_bytes = buffer.getvalue()
    height, width = plan.bucket
    shard = ShardFacts(
        name=plan.name,
        num_samples=len(keys),
        num_bytes=len(tar_bytes),
        bucket=f"{height}x{width}",
        sha256=hashlib.sha256(tar_bytes).hexdigest(),
    )
    columns = {kind: tuple(rows) for kind, rows in places.items()}
    record = ShardRecord(
        plan=plan.digest(inputs),
        shard=shard,
        samples=tuple(numbers),
        keys=tuple(keys),
        places=columns,
        broken=tuple(broken),
    )
    return tar_bytes, record


def write_shard(store: Store, tar_bytes: bytes, record: ShardRecord) -> None:
    """The tar, then the record that vouches for it. Raises StorageError."""
    store.delete(record_name(record.shard.name))  # of a tar that was lost: it must not vouch for the new one
    store.put(record.shard.name, tar_bytes)
    store.put(record_name(record.shard.name), record.model_dump_json().encode())


def read_record(store: Store, plan: ShardPlan, inputs: str) -> ShardRecord | None:
    """The record of the shard that `plan` asks for; None where it is not made yet, or was made from something else."""
    name = record_name(plan.name)
    if store.size(name) is None:
        return None
    try:
        record = ShardRecord.model_validate_json(store.get(name))
    except ValidationError:
        log.warning("%s is not the record of a shard; the shard is made again", store.url(name))
        return None
    return record if record.plan == plan.digest(inputs) and store.size(plan.name) == record.shard.num_bytes else None


def record_name(shard: str) -> str:
    """Where the record of the shard of that name lies."""
    return f"shards/{shard.removesuffix('.tar')}.json"


def _load(source: Source, plan: ShardPlan) -> Iterator[Loaded]:
    """The samples in slices, with their pictures at the bucket's resolution; one slice ahead of its use."""
    cuts = range(SLICE_SAMPLES, len(plan.samples), SLICE_SAMPLES)
    slices: Sequence[np.ndarray] = np.split(plan.samples, cuts)
    with ThreadPoolExecutor(1, thread_name_prefix="megadit-pack") as pool:
        pending = pool.submit(_load_slice, source, slices[0], plan.bucket)
        for after in slices[1:]:
            current, pending = pending, pool.submit(_load_slice, source, after, plan.bucket)
            yield current.result()
        yield pending.result()


def _load_slice(source: Source, numbers: np.ndarray, bucket: tuple[int, int]) -> Loaded:
    samples, pictures, sound, broken = [], [], [], []
    for number, sample in zip(numbers.tolist(), source.read(numbers), strict=True):
        try:
            picture = fit(sample.picture, bucket, f"{source.name}: the picture {sample.key!r}")
        except SourceError as error:
            log.warning("%s; it is left out", error)
            broken.append(sample.key)
            continue
        samples.append(sample)
        pictures.append(picture)
        sound.append(number)
    return samples, pictures, sound, broken
