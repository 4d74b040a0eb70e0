"""The sets of pictures that are scored or compared with: generated ones, a folder of images, an .npz of ADM."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megadit.eval.features import Pictures, checked, decode
from megadit.eval.resize import Pixels
from megadit.eval.units import complete, read_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ADM_KEY = "arr_0"


class Generated:
    """The finished folder of `megadit eval generate`, in the order of its units.

    The group of a picture is its prompt's `category` (MJHQ) or `tag` (GenEval). Raises ValueError where it is not
    complete.
    """

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.units = complete(folder)
        self._prompts = read_prompts(folder)
        self.digests = [unit.sha256 for unit in self.units]
        self.groups = [_group(self._prompts[unit.prompt]) for unit in self.units]

    def pixels(self, number: int) -> Pixels:
        unit = self.units[number]
        data = unit.path.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != unit.sha256:
            raise ValueError(f"{unit.path} has changed since it was generated: sha256 {found}, not {unit.sha256}")
        return decode(data, str(unit.path))

    def prompt(self, number: int) -> str:
        text = self._prompts[self.units[number].prompt].get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{self.name}: prompt {self.units[number].prompt} has no text; this metric needs captions")
        return text


def _group(prompt: dict[str, Any]) -> str:
    return str(prompt.get("category") or prompt.get("tag") or "")


class Folder:
    """All images under a folder, by name. A file's group is the first folder of its path (`animals/0001.jpg`)."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self._paths:
            raise ValueError(f"{folder}: no images ({', '.join(SUFFIXES)}) in it")
        self.digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._paths]
        places = [path.relative_to(folder).parts for path in self._paths]
        self.groups = [parts[0] if len(parts) > 1 else "" for parts in places]

    def pixels(self, number: int) -> Pixels:
        return decode(self._paths[number].read_bytes(), str(self._paths[number]))

    def prompt(self, number: int) -> str:
        raise ValueError(f"{self.name} is a folder of images without captions")


class Npz:
    """The images of an .npz of ADM: `arr_0`, uint8 [N, H, W, 3]."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        images = _read_npz(path)
        self.digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        self.groups = [""] * len(images)

    @cached_property
    def _images(self) -> Pixels:
        """Read by each rank when it first needs them: two gigabytes in ADM's files, too much to send."""
        return _read_npz(Path(self.name))

    def pixels(self, number: int) -> Pixels:
        return checked(self._images[number], f"{self.name}[{number}]")

    def prompt(self, number: int) -> str:
        raise ValueError(f"{self.name} has no captions")


def _read_npz(path: Path) -> Pixels:
    try:
        with np.load(path) as arrays:
            if ADM_KEY not in arrays:
                raise ValueError(f"{path} has no {ADM_KEY}: this metric needs the images, not only their statistics")
            images: Pixels = arrays[ADM_KEY]
    except (OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{path}: {ADM_KEY} is {images.dtype} {images.shape}, not uint8 [N, height, width, 3]")
    return images


def open_reference(path: Path) -> Pictures:
    """A folder of images, a folder of `megadit eval generate`, or an .npz with images. Raises ValueError."""
    if path.suffix == ".npz":
        return Npz(path)
    if not path.is_dir():
        raise ValueError(f"reference {path}: no such folder or .npz file")
    return Generated(path) if (path / "manifest.json").is_file() else Folder(path)


def fingerprint(pictures: Pictures) -> str:
    """Sixteen digits for the pictures and their order."""
    return hashlib.sha256("".join(pictures.digests).encode()).hexdigest()[:16]
