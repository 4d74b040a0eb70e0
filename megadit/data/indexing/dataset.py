"""Indexing: tars that lie elsewhere become a data set without being copied or changed (SA-1B's 1000 of 10 GB each).

<destination>/parts/<tar>.npz     what is in one tar, written when it was read whole (see scans.py)
<destination>/captions/<tar>.txt  the captions of its samples, one after the other, in their order (see captions.py)
<destination>/index/...           the columns, manifest.json, which is written last

Each tar is read once, in ranges, several side by side. Which samples there are and in which order is a function of the
tars and the captions alone: tars by name, samples by the place of their picture in the tar.
"""

import fnmatch
import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from megadit.data.bars import Bars, Tally, no_bars
from megadit.data.format.index import Index
from megadit.data.format.manifest import CAPTION, MANIFEST_NAME, METADATA, ImageFacts, Manifest, ShardFacts
from megadit.data.indexing.captions import CaptionTable, Joined, join
from megadit.data.indexing.checklist import read_checklist
from megadit.data.indexing.gunzip import gunzip
from megadit.data.indexing.scans import SCANS_FOLDER, Tar, load_scan, save_scan
from megadit.data.indexing.tars import PICTURES, TarContent, TarError, scan
from megadit.data.storage import Store, open_store
from megadit.data.storage.object_file import ObjectFile

log = logging.getLogger(__name__)

PLAN_NAME = f"{SCANS_FOLDER}/tars.json"
MEMBERS = ("jpg", METADATA)


class IndexingError(ValueError):
    """What cannot be indexed, and why. One line."""


@dataclass(frozen=True)
class Indexed:
    """The data set, and what is not in it.

    others: members of the tars that are of no sample, by what follows their first dot; unknown_captions: those whose
    key no sample has; num_read: tars that were read now.
    """

    manifest: Manifest
    others: dict[str, int] = field(default_factory=dict)
    unknown_captions: int = 0
    num_read: int = 0


def index(
    tars: str,
    destination: str,
    *,
    match: str = "*.tar",
    members: Sequence[str] = MEMBERS,
    captions: CaptionTable | None = None,
    checklist: str | None = None,
    gunzip_to: str | None = None,
    workers: int = 4,
    bars: Bars = no_bars,
) -> Indexed:
    """Index the tars at `tars` (s3://bucket/prefix, file:///folder or a path) into a data set at `destination`.

    match: of their names without folders; `tars` may end in such a pattern instead. members: the kinds that a sample
    must have, a picture and no, one or both of json and txt. checklist: a file of md5 or sha256 of the tars. gunzip_to:
    where to write tars that are compressed.
    Raises IndexingError, TarError, CaptionError and StorageError. What a broken call has read stays, and the same call
    goes on from there; a tar whose ETag changed is read again.
    """
    kinds = _check_members(members)
    folder, _, last = tars.rpartition("/")
    if any(character in last for character in "*?["):
        tars, match = folder or ".", last
    source, store = open_store(tars), open_store(destination)
    names = [name for name in source.list() if fnmatch.fnmatchcase(name.rpartition("/")[2], match)]
    if not names:
        raise IndexingError(f"{source.url()}: nothing there is called {match!r}; it may be empty, or not exist")
    root = open_store(gunzip_to) if gunzip_to is not None else source
    _check_destination(store, root.url())
    digests = read_checklist(checklist) if checklist else None
    with ThreadPoolExecutor(workers, thread_name_prefix="megadit-index") as pool:
        if gunzip_to is not None:
            with bars("unpacking tars") as advance:
                unpacked = Tally(advance, sum(size or 0 for size in pool.map(source.size, names)))
                names = sorted(pool.map(lambda name: gunzip(source, name, root, unpacked.add), names))
        planned = list(pool.map(lambda name: _describe(root, name, kinds, digests), names))
        known = list(pool.map(lambda name: load_scan(store, name), names))
    wanted = [tar for tar, part in zip(planned, known, strict=True) if part is None or part[0] != tar]
    with bars("reading tars") as advance:
        _read(root, store, wanted, workers, Tally(advance, sum(tar.num_bytes for tar in wanted)))
    store.put(PLAN_NAME, json.dumps({"root": root.url(), "tars": names}, indent=1).encode())
    return replace(_assemble(store, root.url(), names, captions, bars), num_read=len(wanted))


def add_captions(destination: str, captions: CaptionTable, bars: Bars = no_bars) -> Indexed:
    """Join captions to the indexed data set at `destination`, in place of those that it has; no tar is read.

    Raises IndexingError, CaptionError, ManifestError and StorageError.
    """
    store = open_store(destination)
    manifest = Manifest.load(destination)
    if manifest.root is None or store.size(PLAN_NAME) is None:
        raise IndexingError(f"{store.url()} was not made by `megadit data index`; captions are packed with pictures")
    plan = json.loads(store.get(PLAN_NAME))
    return _assemble(store, plan["root"], plan["tars"], captions, bars)


def _check_members(members: Sequence[str]) -> tuple[str, ...]:
    """The kinds, the picture first."""
    pictures = [kind for kind in members if kind in PICTURES]
    if len(pictures) != 1 or set(members) - {*pictures, METADATA, CAPTION} or len(set(members)) != len(members):
        raise IndexingError(
            f"members {','.join(members)}: a sample has one picture ({', '.join(PICTURES)}), and {METADATA} or "
            f"{CAPTION} where the tars have them"
        )
    return (*pictures, *sorted(set(members) - set(pictures)))


def _check_destination(store: Store, root: str) -> None:
    """It may have an index of the same tars, which is then made anew, and no other data set."""
    if store.size(MANIFEST_NAME) is not None and (manifest := Manifest.load(store.url())).root != root:
        raise IndexingError(f"{store.url()} has another data set ({manifest.name}); choose another destination")


def _describe(source: Store, name: str, members: tuple[str, ...], digests: dict[str, str] | None) -> Tar:
    short = name.rpartition("/")[2]
    if digests is not None and short not in digests:
        raise IndexingError(f"{source.url(name)} is not in the checklist")
    num_bytes, etag = source.size(name), source.etag(name)
    assert num_bytes is not None and etag is not None  # it was listed
    return Tar(name, num_bytes, etag, members, digests[short] if digests else "")


def _read(source: Store, store: Store, wanted: Sequence[Tar], workers: int, tally: Tally) -> None:
    """Make the parts of these tars. Those that are wrong are told together, at the end."""
    stop = threading.Event()

    def advance(window: bytes) -> None:
        if stop.is_set():
            raise IndexingError("stopped")  # nobody waits for it
        tally.add(len(window))

    def read(tar: Tar) -> str:
        try:
            save_scan(store, tar, _scan(source, tar, advance))
        except TarError as error:
            return str(error)
        return ""

    pool = ThreadPoolExecutor(workers, thread_name_prefix="megadit-index")
    try:
        # The first to fail is told: those that then stop finish after it.
        results = [future.result() for future in as_completed([pool.submit(read, tar) for tar in wanted])]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if wrong := sorted(message for message in results if message):
        raise TarError(f"{len(wrong)} of {len(wanted)} tars cannot be indexed: {'; '.join(wrong)}")


def _scan(source: Store, tar: Tar, advance: Callable[[bytes], None]) -> TarContent:
    algorithm, _, digest = tar.digest.partition(" ")
    state = hashlib.new(algorithm, usedforsecurity=False) if algorithm else None

    def on_window(window: bytes) -> None:
        advance(window)
        if state:
            state.update(window)

    file = ObjectFile(source, tar.name, on_window, tar.etag)
    content = scan(file, tar.members)
    file.finish()
    if state and state.hexdigest() != digest:
        raise TarError(f"{file.url} has the {algorithm} {state.hexdigest()}, the checklist says {digest}")
    return content


def _assemble(store: Store, root: str, names: Sequence[str], captions: CaptionTable | None, bars: Bars) -> Indexed:
    """The data set of the parts. The manifest is written last."""
    tars, contents = _load_scans(store, names)
    others = _sum(content.others for content in contents)
    if not any(len(content.keys) for content in contents):
        found = ", ".join(f"{count} .{kind}" for kind, count in sorted(others.items())) or "nothing"
        wanted = " and ".join(tars[0].members)
        raise IndexingError(f"{root}: no sample has {wanted} (--members); other members there: {found}")
    if captions and CAPTION in tars[0].members:
        raise IndexingError(f"{root}: its samples have captions in the tars already (--members); leave --captions out")
    inputs = _digest([root, [asdict(tar) for tar in tars], captions and captions.identity()])
    keys = np.concatenate([content.keys for content in contents])
    counts = np.array([len(content.keys) for content in contents])
    order = np.argsort(keys, kind="stable")
    _check_unique(keys, order, counts, names)
    left_out = Counter(_sum(content.left_out for content in contents))
    places = {kind: np.concatenate([content.places[kind] for content in contents]) for kind in tars[0].members}
    sizes = np.concatenate([content.sizes for content in contents])
    kept, joined = np.ones(len(keys), dtype=bool), None
    if captions:
        joined = join(captions, keys, order, counts, [f"captions/{name}.txt" for name in names], store, bars)
        kept, places[CAPTION] = joined.found, joined.places
        left_out += joined.left_out
    manifest = Manifest(
        name=root.rstrip("/").rpartition("/")[2],
        inputs=inputs,
        num_samples=int(kept.sum()),
        members=tuple(places),
        root=root,
        image=ImageFacts(member=tars[0].members[0], resize=None),
        left_out=dict(left_out),
        shards=_shards(tars, np.split(kept, np.cumsum(counts)[:-1]), joined),
        index=Index(
            np.ascontiguousarray(keys[kept]), {kind: column[kept] for kind, column in places.items()}, sizes[kept]
        ).write(store),
    ).sealed()
    store.put(MANIFEST_NAME, manifest.dump())
    return Indexed(manifest, others, joined.unknown if joined else 0)


def _load_scans(store: Store, names: Sequence[str]) -> tuple[list[Tar], list[TarContent]]:
    parts = [load_scan(store, name) for name in names]
    for name, part in zip(names, parts, strict=True):
        if part is None:
            raise IndexingError(
                f"{store.url(SCANS_FOLDER)}: the part of {name} is gone; run `megadit data index` again"
            )
    found = [part for part in parts if part]
    return [tar for tar, _ in found], [content for _, content in found]


def _shards(tars: Sequence[Tar], kept: Sequence[np.ndarray], joined: Joined | None) -> tuple[ShardFacts, ...]:
    """Tars without a sample are no shards."""
    shards = []
    for number, (tar, mask) in enumerate(zip(tars, kept, strict=True)):
        if not mask.any():
            log.warning("%s: none of its samples is in the data set", tar.name)
            continue
        algorithm, _, digest = tar.digest.partition(" ")
        shards.append(
            ShardFacts(
                name=tar.name,
                num_samples=int(mask.sum()),
                num_bytes=tar.num_bytes,
                bucket=None,
                sha256=digest if algorithm == "sha256" else None,
                etag=tar.etag,
                captions=joined.files[number] if joined else None,
            )
        )
    return tuple(shards)


def _check_unique(keys: np.ndarray, order: np.ndarray, counts: np.ndarray, names: Sequence[str]) -> None:
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(same):
        first, second = (names[np.searchsorted(np.cumsum(counts), order[same[0] + n], side="right")] for n in (0, 1))
        key = ordered[same[0]].decode()
        raise IndexingError(f"the key {key!r} occurs twice, in {first} and in {second}; {len(same)} keys do")


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
