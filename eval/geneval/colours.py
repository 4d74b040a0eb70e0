"""GenEval's colour classifier: CLIP ViT-L/14 without training, on the object cut out of its image.

As color_classification of evaluate_images.py of djghosh13/geneval (which runs under fp16 autocast; this is fp32).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, PreTrainedTokenizerBase

from megadit.eval.geneval.verdicts import COLOURS, Detection
from megadit.eval.networks.clip import load_tokenizer, prepare
from megadit.eval.weights import load_folder

BACKGROUND = "#999"


class ColourClassifier:
    """Names the colour of objects, one of COLOURS."""

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.device = device
        self._model = model.eval().requires_grad_(False).to(device)
        self._tokenizer = tokenizer
        self._targets: dict[str, Tensor] = {}  # by class: [colours, features], of length 1

    @staticmethod
    def load(folder: Path, device: torch.device) -> "ColourClassifier":
        """From a folder with a transformers CLIP model. Raises ValueError, also for one with the wrong activation."""
        model = load_folder(CLIPModel, folder)
        assert isinstance(model, CLIPModel)
        tokenizer = load_tokenizer(folder, model)
        for tower in (model.config.text_config, model.config.vision_config):
            if tower.hidden_act != "quick_gelu":
                raise ValueError(
                    f"{folder}/config.json: hidden_act of {tower.model_type} is {tower.hidden_act!r}; OpenAI trained "
                    "CLIP with 'quick_gelu', and with anything else colours come out wrong without an error"
                )
        return ColourClassifier(model, tokenizer, device)

    @torch.inference_mode()
    def classify(self, image: Image.Image, class_name: str, detections: Sequence[Detection]) -> list[str]:
        """The colour of each of some detections of a class in an RGB image."""
        size = self._model.config.vision_config.image_size
        pixels = torch.stack([prepare(cut_out(image, detection), size) for detection in detections])
        features = self._model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
        similarity = functional.normalize(features, dim=-1) @ self._target(class_name).T
        return [COLOURS[place] for place in similarity.argmax(dim=-1).tolist()]

    def _target(self, class_name: str) -> Tensor:
        if class_name not in self._targets:
            captions = [caption for colour in COLOURS for caption in templates(colour, class_name)]
            inputs = self._tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(self.device)
            features = self._model.get_text_features(**inputs).pooler_output
            by_colour = functional.normalize(features, dim=-1).unflatten(0, (len(COLOURS), -1)).mean(dim=1)
            self._targets[class_name] = functional.normalize(by_colour, dim=-1)
        return self._targets[class_name]


def templates(colour: str, class_name: str) -> tuple[str, str, str]:
    """The captions whose mean embedding stands for a colour of a class."""
    return (
        f"a photo of a {colour} {class_name}",
        f"a photo of a {colour}-colored {class_name}",
        f"a photo of a {colour} object",
    )


def cut_out(image: Image.Image, detection: Detection) -> Image.Image:
    """The part of an RGB image inside the box, with everything outside the mask in grey."""
    if detection.mask is not None:
        assert detection.mask.shape == image.size[::-1], (detection.mask.shape, image.size)
        grey = Image.new("RGB", image.size, color=BACKGROUND)
        image = Image.composite(image, grey, Image.fromarray(detection.mask))
    return image.crop(detection.box)
