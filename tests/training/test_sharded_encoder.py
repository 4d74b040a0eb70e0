"""A text encoder that is read by the rows of each rank: what it gives, to the last bit, and what it does not take."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from megadit.data.encoders.text_encoder import MINILM, TextEncoder, TextEncoderError

CAPTIONS = ["a crop of the woman", "in", "", "the moon, 3.5 of it in a picture of the sky"]
WORKER = "sharded_encoder.py"


@pytest.fixture(scope="module")
def t5(t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5EncoderModel in several files, as T5 v1.1 is: a gated feed-forward part, heads that no rank has evenly."""
    torch.manual_seed(1)
    folder = Path(shutil.copytree(t5_folder, tmp_path_factory.mktemp("t5") / "t5"))
    (folder / "model.safetensors").unlink()
    vocab_size = T5Config.from_pretrained(folder).vocab_size
    sizes = {"vocab_size": vocab_size, "d_model": 16, "d_kv": 5, "d_ff": 33, "num_layers": 3, "num_heads": 3}
    model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_features_are_those_of_the_whole_encoder(dtype: torch.dtype, t5: Path, run_ranks: Callable) -> None:
    """And each rank has half of the weights, the token embedding once."""
    whole = TextEncoder.load(str(t5), dtype=dtype)
    num_weights = sum(parameter.numel() for parameter in whole.module.parameters())
    for features, weights in run_ranks(WORKER, 2, folder=str(t5), captions=CAPTIONS, dtype=dtype):
        assert_equal(features, whole.encode(CAPTIONS))
        assert all(weight.dtype == dtype for weight in weights)
        assert sum(weight.numel() for weight in weights) < 0.6 * num_weights


def with_weights(t5: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    """A copy of the encoder, in one file, with other weights."""
    shutil.copytree(t5, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {name: values for path in sorted(t5.glob("*.safetensors")) for name, values in load_file(path).items()}
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("name", ["encoder alone", "both", "with a decoder"])
def test_names_that_published_files_have(name: str, t5: Path, run_ranks: Callable, tmp_path: Path) -> None:
    """The token embedding by either name or by both; weights that do not encode."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shared = weights["shared.weight"]
        if name == "with a decoder":
            return weights | {"decoder.block.0.weight": torch.zeros(3), "lm_head.weight": shared.clone()}
        rest = {key: value for key, value in weights.items() if key != "shared.weight" or name == "both"}
        return rest | {"encoder.embed_tokens.weight": shared.clone()}

    folder = with_weights(t5, tmp_path / "t5", change)
    for features, _ in run_ranks(WORKER, 2, folder=folder, captions=CAPTIONS, dtype=torch.float32):
        assert_equal(features, TextEncoder.load(str(t5)).encode(CAPTIONS))


def test_an_encoder_with_buffers(run_ranks: Callable) -> None:
    """BERT's places of tokens are buffers that no file has."""
    whole = TextEncoder.load(MINILM)
    for features, _ in run_ranks(WORKER, 2, folder=MINILM, captions=CAPTIONS, dtype=torch.float32):
        assert_equal(features, whole.encode(CAPTIONS))


LACKING = "encoder.block.1.layer.0.SelfAttention.q.weight"
BAD_FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "missing": (
        lambda weights: {name: values for name, values in weights.items() if name != LACKING},
        rf"no file has {LACKING} \(1 are missing\)",
    ),
    "shape": (
        lambda weights: weights | {LACKING: torch.zeros(15, 15)},
        rf"model.safetensors: {LACKING} has the shape \[15, 15\], the configuration asks for \[15, 16\]",
    ),
    "two embeddings": (
        lambda weights: weights | {"encoder.embed_tokens.weight": weights["shared.weight"] + 1},
        r"model.safetensors: \S+ and \S+ should be the same",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_weights_that_are_not_the_models(name: str, t5: Path, run_ranks: Callable, tmp_path: Path) -> None:
    change, message = BAD_FILES[name]
    folder = with_weights(t5, tmp_path / "t5", change)
    with pytest.raises(ExceptionGroup) as caught:
        run_ranks(WORKER, 1, folder=folder, captions=CAPTIONS, dtype=torch.float32)
    assert caught.group_contains(TextEncoderError, match=message)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_file_that_is_cut_short(sharded: bool, t5: Path, run_ranks: Callable, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(t5, tmp_path / "t5"))
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    path = copy / sorted(set(index["weight_map"].values()))[2]
    path.write_bytes(path.read_bytes()[:-7])
    if not sharded:
        with pytest.raises(TextEncoderError, match="cannot load it"):
            TextEncoder.load(str(copy))
        return
    with pytest.raises(ExceptionGroup) as caught:
        run_ranks(WORKER, 1, folder=str(copy), captions=CAPTIONS, dtype=torch.float32)
    assert caught.group_contains(TextEncoderError, match="cannot load it")
