"""Published checkpoints of DiT and PixArt-alpha, whose names our models have.

Files that `torch.save` or safetensors wrote, in three layouts: a bare state dict (DiT-XL-2-256x256.pt),
{model, ema, opt, args} (train.py of facebookresearch/DiT) and {state_dict, state_dict_ema, ...} (PixArt-alpha).
"""

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megadit.interop.strict import load_strictly

logger = logging.getLogger(__name__)

Kind = Literal["ema", "raw"]
KEYS = {"ema": ("ema", "state_dict_ema"), "raw": ("model", "state_dict")}
SUFFIXES = (".pt", ".pth", ".safetensors")


def read_published(path: Path, prefer: Kind = "ema") -> dict[str, Tensor]:
    """The weights in a checkpoint file, under the names that they have there.

    `prefer` chooses where a file has both averaged and raw weights. Nothing in the file is executed: the one class
    allowed besides tensors and containers is argparse.Namespace, in which DiT's train.py stores its arguments.

    Raises ValueError for a file that is no such checkpoint or is damaged.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a checkpoint is a file {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from None
    return _state_dict(_load_pickle(path), path, prefer)


def load_published(model: nn.Module, path: Path, prefer: Kind = "ema") -> None:
    """Load a checkpoint into a DiT or PixArt, strictly; only `pos_embed`, which is no weight, may be missing.

    Raises ValueError that names the first tensors that are missing, unexpected or of another shape.
    """
    state = read_published(path, prefer)
    if "pos_embed" not in state:
        logger.info("%s has no pos_embed: taking the sine-cosine table of the model", path)
        state["pos_embed"] = model.get_buffer("pos_embed")
    load_strictly(model, state, str(path))


def _load_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Optimizer states are most of a training checkpoint: mapped, they are never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own message recommends to run the file's code; it is quoted for the name alone.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"loading it would execute {found[1]}" if found else "it is not a file of torch.save, or it is damaged"
        raise ValueError(f"{path}: refused: {reason}") from None
    except (RuntimeError, EOFError):
        raise ValueError(f"{path}: refused: it is not a file of torch.save, or it is damaged") from None


def _state_dict(content: Any, path: Path, prefer: Kind) -> dict[str, Tensor]:
    if _is_state_dict(content):
        return dict(content)
    if isinstance(content, Mapping):
        other: Kind = "raw" if prefer == "ema" else "ema"
        for kind in (prefer, other):
            for key in KEYS[kind]:
                if _is_state_dict(content.get(key)):
                    logger.info("%s: taking the weights under %r", path, key)
                    return dict(content[key])
        raise ValueError(f"{path}: no weights under {', '.join(map(repr, KEYS['ema'] + KEYS['raw']))}")
    raise ValueError(f"{path}: a checkpoint holds a dict, not {type(content).__name__}")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())
