"""Packing where a pack was broken off: the same one goes on, another one is refused, what is foreign stays."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import webdataset

from megadit.data.format.manifest import Manifest
from megadit.data.packing.destination import PLAN_NAME, claim
from megadit.data.packing.pack import Packed, pack
from megadit.data.packing.settings import PackError, PackSettings
from megadit.data.packing.sources import open_source
from megadit.data.storage import FileStore, open_store

BIRDS = {"size": 8, "shard_samples": 5, "holdout": 4, "where": ("subgroup=animal-bird",), "seed": 3}


class BrokenOff(Exception):
    """Raised within a pack to end it."""


def pack_birds(url: str, on_progress: Callable = lambda done, total: None, **changes: Any) -> Packed | None:
    """Some 20 pictures with their captions, in several shards."""
    return pack(open_source("emoji"), url, PackSettings(**(BIRDS | changes)), bars=lambda _: nullcontext(on_progress))


def contents(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {name: store.get(name) for name in store.list()}


def break_off(url: str, **changes: Any) -> dict[str, bytes]:
    """Stop a pack after its first shard; what is there then."""

    def stop(done: int, total: int) -> None:
        raise BrokenOff

    with pytest.raises(BrokenOff):
        pack_birds(url, stop, **changes)
    return contents(url)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pack that was not broken off."""
    folder = tmp_path_factory.mktemp("whole")
    assert pack_birds(str(folder))
    return contents(str(folder))


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.getfixturevalue('s3_bucket')}/packed" if request.param == "s3" else str(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_samples": 4}, "shard_samples is 4 there, 5 here"),
        ({"seed": 4}, "seed is 4 there, 3 here"),
        ({"holdout": 0}, "holdout is 0 there, 4 here"),
        ({"where": ("subgroup=animal-bug",), "size": 9}, "size is 9 there, 8 here; where is .* there, .* here"),
    ],
)
def test_another_pack_does_not_go_on_beside_its_shards(change: dict, message: str, tmp_path: Path) -> None:
    """A pattern such as shard-*.tar would find the shards of both."""
    before = break_off(str(tmp_path), **change)
    with pytest.raises(PackError, match=rf"has part of another pack, which was broken off \({message}\); run that one"):
        pack_birds(str(tmp_path))
    assert contents(str(tmp_path)) == before
    assert pack_birds(str(tmp_path), **change)


def test_the_same_pack_goes_on(url: str, whole: dict) -> None:
    before = break_off(url)
    assert set(before) == {PLAN_NAME, "train/shard-000000.tar", "train/shards/shard-000000.json"}
    with pytest.raises(PackError, match="seed is 3 there, 4 here"):
        pack_birds(url, seed=4)
    assert contents(url) == before
    assert pack_birds(url)
    assert contents(url) == whole
    again = pack_birds(url)
    assert again
    assert again.skipped


def test_tars_of_nobody_knows_what_are_not_packed_beside(url: str) -> None:
    store = open_store(url)
    store.put("train/notes.txt", b"mine")
    store.put("train/other-000.tar", b"mine")
    before = contents(url)
    with pytest.raises(
        PackError, match=r"1 files of a pack are there already \(.*/train/other-000.tar\), and no .*pack.json says"
    ):
        pack_birds(url)
    assert contents(url) == before
    store.delete("train/other-000.tar")
    assert pack_birds(url)
    assert contents(url)["train/notes.txt"] == b"mine"


def test_a_pack_that_has_made_nothing_yet_is_not_in_the_way(tmp_path: Path, whole: dict) -> None:
    claim(open_store(str(tmp_path)), [], {"seed": 9})
    assert pack_birds(str(tmp_path))
    assert contents(str(tmp_path)) == whole


def test_a_plan_that_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / PLAN_NAME).write_text('["')
    with pytest.raises(PackError, match=r"pack.json is not that of a pack \(.*\); delete it"):
        pack_birds(str(tmp_path))


def test_ranks_that_begin_together(tmp_path: Path) -> None:
    """One looks for shards while the other, which is of the same pack, already writes one."""

    class Beside(FileStore):
        def list(self, prefix: str = "") -> Iterator[str]:
            claim(open_store(str(tmp_path)), [FileStore(self.root)], {"seed": 3})
            self.put("shard-000000.tar", b"")
            yield from super().list(prefix)

    claim(open_store(str(tmp_path)), [Beside(tmp_path / "train")], {"seed": 3})
    with pytest.raises(PackError, match=r"\(seed is 3 there, 4 here\)"):
        claim(open_store(str(tmp_path)), [FileStore(tmp_path / "train")], {"seed": 4})


def test_what_killed_ranks_were_writing_is_removed(whole: dict, tmp_path: Path) -> None:
    break_off(str(tmp_path))
    ours = ["train/.shard-000001.tar.ab_12xyz", "validation/shards/.shard-000000.json.00000000"]
    foreign = ["train/.shard-000001.tar.swp", "train/.shard-999999.tar.ab_12xyz", "train/.hidden"]
    for name in ours + foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    pack_birds(str(tmp_path))
    assert contents(str(tmp_path)).keys() == {*whole, *foreign}


def test_a_lost_tar_is_not_vouched_for_by_its_old_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may round features otherwise: the same size, other bytes."""
    break_off(str(tmp_path))
    tar = tmp_path / "train" / "shard-000000.tar"
    tar.unlink()
    put = FileStore.put

    def put_no_parts(self: FileStore, name: str, data: bytes) -> None:
        if name.startswith("shards/"):
            raise BrokenOff
        put(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "put", put_no_parts)
        with pytest.raises(BrokenOff):
            pack_birds(str(tmp_path))
    tar.write_bytes(bytes(len(tar.read_bytes())))
    pack_birds(str(tmp_path))
    manifest = Manifest.load(str(tmp_path / "train"))
    shards = [str(tmp_path / "train" / shard.name) for shard in manifest.shards]
    assert len(list(webdataset.WebDataset(shards, shardshuffle=False))) == manifest.num_samples
