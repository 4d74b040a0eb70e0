"""What was found in one tar, kept at <data set>/parts/<tar>.npz: a broken run goes on from there, a changed tar is
read again, and captions are joined later without reading any.
"""

import io
import json
import zipfile
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megadit.data.indexing.tars import TarContent
from megadit.data.storage import MissingError, Store

SCANS_FOLDER = "parts"
PLACE_PREFIX = "place."


@dataclass(frozen=True)
class Tar:
    """A tar and how to read it: the kinds of members wanted and the digest that it must have ("md5 0123..."), or "".

    A part belongs to a tar when all of this is the same.
    """

    name: str
    num_bytes: int
    etag: str
    members: tuple[str, ...]
    digest: str


def save_scan(store: Store, tar: Tar, content: TarContent) -> None:
    """Write the part of a tar that was read whole. Raises StorageError."""
    facts = json.dumps({"tar": asdict(tar), "left_out": content.left_out, "others": content.others})
    places = {f"{PLACE_PREFIX}{kind}": column for kind, column in content.places.items()}
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.array(facts), keys=content.keys, sizes=content.sizes, **places)  # type: ignore[arg-type]
    store.put(_file(tar.name), buffer.getvalue())


def load_scan(store: Store, name: str) -> tuple[Tar, TarContent] | None:
    """What is known of the tar `name`; None when nothing is. Raises ValueError for a damaged part, StorageError."""
    try:
        data = store.get(_file(name))
    except MissingError:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            facts: Any = json.loads(str(arrays["facts"]))
            facts["tar"]["members"] = tuple(facts["tar"]["members"])
            tar = Tar(**facts["tar"])
            places = {kind: arrays[f"{PLACE_PREFIX}{kind}"] for kind in tar.members}
            return tar, TarContent(arrays["keys"], places, arrays["sizes"], facts["left_out"], facts["others"])
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{store.url(_file(name))} is damaged; delete it ({error})") from error


def _file(name: str) -> str:
    return f"{SCANS_FOLDER}/{name}.npz"
