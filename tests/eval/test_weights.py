"""Weights that are missing, damaged or another model's: one clear message each."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from megadit.eval.metrics import catalogue
from megadit.eval.metrics.catalogue import (
    CLIP_B32_WEIGHTS,
    DEFAULT_RESIZE,
    INCEPTION_WEIGHTS,
    ON_INCEPTION,
    ON_OTHERS,
    find,
)
from megadit.eval.weights import WeightFile, WeightFolder, load_folder


@pytest.mark.parametrize("name", [*ON_INCEPTION, *ON_OTHERS])
def test_every_metric_says_which_weights_are_missing(tmp_path: Path, name: str) -> None:
    weights = find(name).features.weights
    with pytest.raises(ValueError, match=f"{weights.name}: no such f.*it comes from .*sha256"):
        weights.locate(tmp_path)


def test_another_file_under_the_name_is_refused_with_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / INCEPTION_WEIGHTS.name
    path.write_bytes(b"not these")
    found = hashlib.sha256(b"not these").hexdigest()
    with pytest.raises(ValueError, match=f"sha256 {found}, where 6726825d is right"):
        INCEPTION_WEIGHTS.locate(tmp_path)


def test_the_other_name_of_the_same_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b.pth").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    found = WeightFile("a.pth", digest[:8], "somewhere", other_names=("b.pth",)).locate(tmp_path)
    assert found.path == tmp_path / "b.pth" and found.sha256 == {"b.pth": digest}


@pytest.fixture
def small_clip(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 8}, vision_config=sizes)).save_pretrained(
        tmp_path / CLIP_B32_WEIGHTS.name
    )
    return tmp_path


def test_a_model_of_another_size_is_refused(small_clip: Path) -> None:
    with pytest.raises(ValueError, match=r"vision_config.hidden_size is 8, where 768 is right"):
        CLIP_B32_WEIGHTS.locate(small_clip)


def test_clip_with_the_wrong_activation_is_refused(small_clip: Path) -> None:
    """OpenAI's weights under GELU give other scores without any error."""
    expected = {name: value for name, value in CLIP_B32_WEIGHTS.expected.items() if name.endswith("hidden_act")}
    folder = WeightFolder(CLIP_B32_WEIGHTS.name, "somewhere", expected)
    assert set(folder.locate(small_clip).sha256) == {f"{CLIP_B32_WEIGHTS.name}/model.safetensors"}
    config = small_clip / CLIP_B32_WEIGHTS.name / "config.json"
    config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu', where 'quick_gelu' is right"):
        folder.locate(small_clip)


def test_a_folder_without_some_tensors_is_refused(small_clip: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = small_clip / CLIP_B32_WEIGHTS.name / "model.safetensors"
    state = load_file(path)
    del state["visual_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"visual_projection.weight missing"):
        load_folder(CLIPModel, path.parent)


def test_a_folder_without_configuration_is_refused(small_clip: Path) -> None:
    (small_clip / CLIP_B32_WEIGHTS.name / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        CLIP_B32_WEIGHTS.locate(small_clip)


def test_an_unknown_metric_or_resize_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no metric 'fod': there are fid, sfid"):
        find("fod")
    with pytest.raises(ValueError, match=r"no resize 'pil': there are adm, clean"):
        find("fid", "pil")
    with pytest.raises(ValueError, match=r"cmmd has a resize of its own"):
        find("cmmd", "clean")


def test_ids_name_what_changes_the_number() -> None:
    assert find("fid").id == f"fid/{DEFAULT_RESIZE}" and find("fid", "mup").id == "fid/mup"
    assert find("clip_score").id == "clip_score/openai-vit-b-32/none/100"
    names = [find("fid", resize).features.name for resize in catalogue.RESIZERS]
    assert len(set(names)) == len(catalogue.RESIZERS)  # features of two protocols are never mixed up


def test_ids_of_both_shares_carry_the_rounding() -> None:
    features = torch.randn(10, 4)
    for name, ending in (("precision_recall", ""), ("precision_recall_fp16", "_fp16")):
        compute = find(name, "clean").compute
        assert compute is not None
        assert [value.id for value in compute(features, features)] == [
            f"precision{ending}/clean",
            f"recall{ending}/clean",
        ]
