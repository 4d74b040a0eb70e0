"""CLIP of transformers: embeddings for CMMD, and the agreement of image and text for CLIP score and PickScore.

OpenAI's models need the activation quick_gelu; a folder that says otherwise is refused (see eval/weights.py and the
declarations in eval/metrics/catalogue.py).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from megadit.eval.resize import Pixels, center_crop
from megadit.eval.weights import load_folder

# Of CLIP's training data in [0, 1]: openai/CLIP, clip/clip.py.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 77


class ClipAgreement:
    """The cosine of image and text embedding times what `scale` says of the model, float32 [B, 1]."""

    def __init__(self, folder: Path, device: torch.device, scale: Callable[[CLIPModel], Tensor | float]) -> None:
        model = load_folder(CLIPModel, folder)
        assert isinstance(model, CLIPModel)
        self._model = model.to(device)
        self._tokenizer = load_tokenizer(folder, model)
        self._size: int = model.config.vision_config.image_size
        self._scale, self._device = scale, device

    def prepare(self, pixels: Pixels) -> Tensor:
        """float32 [3, S, S]; see the function `prepare`."""
        return prepare(Image.fromarray(pixels), self._size)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self._device)
        image_BD = self._model.get_image_features(pixel_values=images).pooler_output
        text_BD = self._model.get_text_features(**tokens).pooler_output
        cosine_B = (normalize(image_BD, dim=-1) * normalize(text_BD, dim=-1)).sum(dim=-1)
        return (cosine_B * self._scale(self._model))[:, None]


class ClipEmbedding:
    """L2-normalised image embeddings, float32 [B, projection_dim], as cmmd-pytorch makes them (arXiv 2401.09603)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        # Not CLIPVisionModelWithProjection: it takes the size of the projection from another place of config.json.
        model = load_folder(CLIPModel, folder)
        self._model = model.to(device)
        self._size: int = model.config.vision_config.image_size

    def prepare(self, pixels: Pixels) -> Tensor:
        """The whole picture to the network's size: torch's bicubic without antialiasing or clipping, no crop."""
        image_3HW = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255
        return _normalised(interpolate(image_3HW[None], size=(self._size, self._size), mode="bicubic")[0])

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return normalize(self._model.get_image_features(pixel_values=images).pooler_output, dim=-1)


def times_100(model: CLIPModel) -> float:
    """CLIP score as OpenAI's models give it: their learned scale ended at its cap of 100."""
    return 100.0


def learned_scale(model: CLIPModel) -> Tensor:
    """exp(logit_scale), as PickScore is defined."""
    return model.logit_scale.exp()


def load_tokenizer(folder: Path, model: CLIPModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises ValueError where it is missing or has another vocabulary than the model."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"weights {folder}: no tokenizer: {' '.join(str(error).split())}") from error
    if len(tokenizer) != (size := model.config.text_config.vocab_size):  # without files transformers makes an empty one
        raise ValueError(
            f"weights {folder}: the tokenizer has {len(tokenizer)} tokens, the model {size}; "
            "its files belong into the folder, too"
        )
    return tokenizer


def prepare(image: Image.Image, size: int) -> Tensor:
    """An RGB image as openai/CLIP takes it: shorter side to `size` (bicubic), the centre. float32 [3, size, size]."""
    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    centre = center_crop(image.resize((width, height), Image.Resampling.BICUBIC), size)
    return _normalised(torch.from_numpy(np.array(centre)).permute(2, 0, 1) / 255)


def _normalised(image_3HW: Tensor) -> Tensor:
    return (image_3HW - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
