"""A second copy of each checkpoint in S3, and a first one from there where a run has none.

    COPY_URL/recipe.yaml                              of the run, so that no other run resumes from its checkpoints
    COPY_URL/images-0000012800/rank-0.bin.00000       files in pieces, which `cat` joins: one PUT takes 5 GB at most
    COPY_URL/images-0000012800/checkpoint.json        the header, last: without it a copy is not whole

Rank 0 sends them all, several pieces at a time, and removes those that the run keeps no longer, the header first. What
has no header, as a copy that was broken off, goes with them.
"""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megadit import recipe as recipes
from megadit.data.storage import MissingError, Store, open_store
from megadit.distributed import Topology
from megadit.files import PARTIAL
from megadit.recipe import Recipe
from megadit.training.checkpoint import folders
from megadit.training.checkpoint.folders import HEADER, CheckpointError
from megadit.training.checkpoint.loading import newest_complete
from megadit.training.checkpoint.reader import find_damage

PIECE_BYTES = 2**27
NUM_THREADS = 4  # pieces in memory at a time
RECIPE = "recipe.yaml"
logger = logging.getLogger(__name__)


class Copies:
    """The copies of one run's checkpoints, at `url`."""

    def __init__(self, url: str, recipe: Recipe) -> None:
        self._store: Store = open_store(url)
        self._recipe = recipe

    def send(self, path: Path, progress: Callable[[], object]) -> None:
        """Copy a whole checkpoint; `progress` is called for every piece. Raises StorageError."""
        self._store.put(RECIPE, recipes.dump(self._recipe).encode())
        pieces = [
            (path / name, start) for name, size in folders.read_header(path).files.items() for start in _starts(size)
        ]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for _ in pool.map(lambda piece: self._send_piece(*piece), pieces):
                progress()
        self._store.put(f"{path.name}/{HEADER}", (path / HEADER).read_bytes())

    def prune(self, written: str, keep: int, keep_every_images: int | None, progress: Callable[[], object]) -> None:
        """Remove all but the newest `keep` and the first of each interval of images, and what is no whole copy.

        `progress` is called for every object. Raises StorageError, after which what is left to remove is no copy.
        """
        names = list(self._store.list("images-"))
        whole = [Path(name).parent for name in names if name.endswith(f"/{HEADER}")]
        doomed = folders.superfluous(whole, written, keep, keep_every_images)
        kept = {path.name for path in whole if path not in doomed}
        for name in sorted(names, key=lambda name: (not name.endswith(f"/{HEADER}"), name)):
            if name.split("/")[0] not in kept:
                self._store.delete(name)
                progress()

    def fetch_newest(self, folder: Path) -> Path | None:
        """Bring the newest whole copy into a folder of checkpoints; None when there are no copies.

        Raises CheckpointError when the copies are of another recipe or none is whole, and StorageError.
        """
        headers = [name for name in self._store.list("images-") if name.endswith(f"/{HEADER}")]
        if not headers:
            return None
        self._check_same_recipe(max(folders.images_seen(Path(name).parent) for name in headers))
        for header in sorted(headers, reverse=True):
            partial = folder / f"{PARTIAL}{header.removesuffix(f'/{HEADER}')}"
            folders.make_partial(partial)
            damage = self._fetch(partial)
            if damage is None:
                return folders.publish(partial)
            shutil.rmtree(partial)
            logger.warning("the copy %s is damaged: %s; trying the one before", self._store.url(header), damage)
        raise CheckpointError(
            f"no checkpoint at {self._store.url()} is whole; start anew with another checkpoints.copy_url"
        )

    def _send_piece(self, file: Path, start: int) -> None:
        with file.open("rb") as stream:
            stream.seek(start)
            self._store.put(_piece(file.parent.name, file.name, start), stream.read(PIECE_BYTES))

    def _fetch(self, partial: Path) -> str | None:
        """Fill the folder. Returns what is wrong with it, or None."""
        name = partial.name.removeprefix(PARTIAL)
        content = self._store.get(f"{name}/{HEADER}")
        try:
            header = folders.parse_header(content, self._store.url(name))
            for file, size in header.files.items():
                with (partial / file).open("wb") as stream:
                    for start in _starts(size):
                        stream.write(self._store.get(_piece(name, file, start)))
        except CheckpointError:
            raise
        except (ValueError, MissingError) as error:
            return str(error)
        (partial / HEADER).write_bytes(content)
        for path in partial.iterdir():
            folders.sync(path)
        return find_damage(partial)

    def _check_same_recipe(self, images_seen: int) -> None:
        there = recipes.parse_text(self._store.get(RECIPE), self._store.url(RECIPE))
        refused, _ = recipes.compare_pasts(there, self._recipe, images_seen)
        if refused:
            raise CheckpointError(
                f"the copies at {self._store.url()} are of another recipe ({'; '.join(refused)}); give another "
                "checkpoints.copy_url"
            )


def newest_of_run(run: Path, recipe: Recipe, topology: Topology) -> Path | None:
    """The newest checkpoint of the run with all its files, brought here from its copies when it has none at all.

    For `load_or_before`: what is in the files is not looked at. Called by all ranks together.
    """
    folder, url = run / "checkpoints", recipe.checkpoints.copy_url
    found = newest_complete(folder, topology)
    if found is None and url is not None:
        found = topology.on_first(lambda: Copies(url, recipe).fetch_newest(folder))
    return found


def _starts(size: int) -> range:
    return range(0, size, PIECE_BYTES)


def _piece(checkpoint: str, file: str, start: int) -> str:
    return f"{checkpoint}/{file}.{start // PIECE_BYTES:05d}"
