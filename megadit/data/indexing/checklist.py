"""Checklists of whole files: lines of md5 or sha256 and a name, as md5sum writes and as SA-1B's checklist.chk."""

from megadit.data.storage.object_file import open_object

ALGORITHMS = {32: "md5", 64: "sha256"}  # by the length of the digest in hexadecimal


def read_checklist(url: str) -> dict[str, str]:
    """Name without folders -> "md5 0123..." or "sha256 0123...". Raises ValueError, StorageError."""
    digests: dict[str, str] = {}
    for number, line in enumerate(open_object(url).read().decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").rpartition("/")[2]
        if len(digest) not in ALGORITHMS or set(digest.lower()) - set("0123456789abcdef") or not name:
            raise ValueError(f"{url} line {number}: expected an md5 or sha256 and the name of a file")
        digests[name] = f"{ALGORITHMS[len(digest)]} {digest.lower()}"
    return digests
