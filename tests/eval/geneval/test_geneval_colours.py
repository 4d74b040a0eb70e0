"""The colour classifier: what part of the picture CLIP sees, with which activation, against which captions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from megadit.eval.geneval.colours import ColourClassifier, cut_out, templates
from megadit.eval.geneval.verdicts import COLOURS, Detection
from megadit.eval.networks.clip import prepare

CPU = torch.device("cpu")
GREY = (0x99, 0x99, 0x99)


def patches(seed: int, size: int = 40) -> Image.Image:
    """A picture of large random patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def lower_left(size: int = 40) -> np.ndarray:
    return np.tri(size, dtype=bool)


def test_the_cut_is_the_box_with_grey_outside_the_mask() -> None:
    image = patches(0)
    cut = np.asarray(cut_out(image, Detection((5, 10, 25, 30), 1, lower_left())))
    original = np.asarray(image)
    assert cut.shape == (20, 20, 3)
    for y in range(20):
        for x in range(20):
            inside = x + 5 <= y + 10
            assert tuple(cut[y, x]) == (tuple(original[y + 10, x + 5]) if inside else GREY)


def test_without_a_mask_the_whole_box_is_kept() -> None:
    image = patches(0)
    cut = np.asarray(cut_out(image, Detection((5, 10, 25, 30), 1)))
    assert np.array_equal(cut, np.asarray(image)[10:30, 5:25])


def test_colours_equal_the_definition_one_caption_and_one_cut_at_a_time(clip_folder: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)

    @torch.inference_mode()
    def text(caption: str) -> torch.Tensor:
        feature = model.get_text_features(**tokenizer(caption, return_tensors="pt")).pooler_output[0]
        return feature / feature.norm()

    @torch.inference_mode()
    def nearest(cut: Image.Image, class_name: str) -> str:
        feature = model.get_image_features(pixel_values=prepare(cut, 16)[None]).pooler_output[0]
        means = {colour: sum(map(text, templates(colour, class_name))) / 3 for colour in COLOURS}
        return max(COLOURS, key=lambda colour: float(feature @ means[colour] / means[colour].norm()))

    classifier = ColourClassifier.load(clip_folder, CPU)
    found = set()
    for class_name in ("dog", "teddy bear"):
        for seed in range(4):
            image = patches(seed)
            objects = [Detection((0, 0, 40, 40), 1, lower_left()), Detection((10, 0, 30, 25), 1)]
            colours = classifier.classify(image, class_name, objects)
            assert colours == [nearest(cut_out(image, one), class_name) for one in objects]
            found |= set(colours)
    assert len(found) > 1, "a classifier that always says one colour would pass"


def test_captions_are_genevals() -> None:
    assert templates("red", "wine glass") == (
        "a photo of a red wine glass",
        "a photo of a red-colored wine glass",
        "a photo of a red object",
    )


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_another_activation_is_refused(clip_folder: Path, tmp_path: Path, tower: str) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config[tower]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"hidden_act of clip_\w+ is 'gelu'; OpenAI trained CLIP with 'quick_gelu'"):
        ColourClassifier.load(folder, CPU)


def test_a_folder_without_a_tokenizer_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(
        clip_folder, tmp_path / "clip", ignore=shutil.ignore_patterns("*token*", "vocab*", "merge*")
    )
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model 190"):
        ColourClassifier.load(folder, CPU)
