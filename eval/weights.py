"""Weights of the networks that judge: what each is called, where it comes from, and whether a folder has it.

Nothing is downloaded. A file that is known by its SHA-256 is compared with it, so that a score can be trusted to be
what its name says; a folder of transformers is compared by the sizes in its config.json. The hashes of what was used
are stored with every score.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from megadit.checksums import sha256_of


@dataclass(frozen=True)
class Located:
    """Weights that are there: the path of the file or folder, and the SHA-256 of each file of weights."""

    path: Path
    sha256: dict[str, str]

    def digest(self) -> str:
        """Eight digits for all of them."""
        return hashlib.sha256("".join(sorted(self.sha256.values())).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class WeightFile:
    """A file of weights. `sha256` is its SHA-256 or the first digits of it; `source` says where to get it."""

    name: str
    sha256: str
    source: str
    other_names: tuple[str, ...] = ()

    def locate(self, folder: Path) -> Located:
        """Find the file in `folder`. Raises ValueError where it is missing or another one, with the SHA-256."""
        path = next((folder / name for name in (self.name, *self.other_names) if (folder / name).is_file()), None)
        if path is None:
            raise ValueError(
                f"weights {folder / self.name}: no such file; it comes from {self.source} (sha256 {self.sha256})"
            )
        found = sha256_of(path)
        if not found.startswith(self.sha256):
            raise ValueError(
                f"weights {path}: another file, or a damaged one: sha256 {found}, where {self.sha256} is right; "
                f"it comes from {self.source}"
            )
        return Located(path, {path.name: found})


@dataclass(frozen=True)
class WeightFolder:
    """A folder of transformers: config.json, *.safetensors and, for text, the tokenizer's files.

    `expected` maps dotted names of the configuration to their values: the files are published in several forms with
    one SHA-256 each, but a model of another size or activation is another judge.
    """

    name: str
    source: str
    expected: Mapping[str, Any] = field(default_factory=dict)

    def locate(self, folder: Path) -> Located:
        """Find the folder in `folder`. Raises ValueError where it is missing or has another model."""
        path = folder / self.name
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"weights {path}: no such folder of transformers (config.json, *.safetensors); "
                f"it comes from {self.source}; sha256 not pinned, the scores say what was used"
            )
        config = self._config(path)
        for name, value in self.expected.items():
            found: Any = config
            for part in name.split("."):
                found = getattr(found, part, None)
            if found != value:
                raise ValueError(
                    f"weights {path}: another model: {name} is {found!r}, where {value!r} is right; "
                    f"it comes from {self.source}"
                )
        return Located(path, {f"{self.name}/{file.name}": sha256_of(file) for file in files})

    @staticmethod
    def _config(path: Path) -> Any:
        try:
            return AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"weights {path}: config.json cannot be read: {' '.join(str(error).split())}") from error


Weights = WeightFile | WeightFolder


def load_file(network: nn.Module, path: Path) -> None:
    """Load a file of torch.save into `network`. Raises ValueError where a tensor is missing or of another size."""
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # torch.load raises a dozen kinds for a file that is none of its own
        raise ValueError(f"weights {path}: cannot be loaded: {' '.join(str(error).split())}") from error
    network.eval().requires_grad_(False)


def load_folder(model_class: type[PreTrainedModel], path: Path) -> PreTrainedModel:
    """The frozen fp32 model of a folder of transformers. Raises ValueError where tensors are missing."""
    transformers_logging.disable_progress_bar()  # loading takes a moment only
    try:
        model, report = model_class.from_pretrained(
            path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"weights {path}: cannot be loaded: {' '.join(str(error).split())}") from error
    if report["missing_keys"]:  # transformers would go on with random values
        raise ValueError(f"weights {path}: {', '.join(sorted(report['missing_keys'])[:3])} missing")
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen
