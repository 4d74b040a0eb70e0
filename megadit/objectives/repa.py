"""The alignment loss of REPA (arXiv 2410.06940, equation 8): image tokens should foretell features of DINOv2.

The encoder sees the clean picture, the network the noisy one. One encoder patch belongs to one image token.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from megadit.models import ModelConfig

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# Of ImageNet's pictures in [0, 1], as in the preprocessor_config.json of facebook/dinov2-base.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST_LENGTH = 1.0


class Alignment:
    """A frozen DINOv2, fp32, and the loss against it.

    Raises ValueError where `encoder` is not a folder with a DINOv2 of the head's feature dimension, and where the
    model does not work on pixels.
    """

    def __init__(self, encoder: str, model: ModelConfig, device: torch.device) -> None:
        if model.in_channels != 3:
            raise ValueError(
                f"objective.repa needs pictures of 3 channels, not model.in_channels {model.in_channels}: "
                "the image encoder takes pixels, not latents"
            )
        self._encoder = load_encoder(encoder).to(device)
        config = self._encoder.config
        if config.hidden_size != model.feature_dim:
            raise ValueError(
                f"image encoder {encoder}: it has {config.hidden_size} features, "
                f"model.repa.feature_dim is {model.feature_dim}"
            )
        self._num_tokens = model.num_patches
        self._encoder_size = model.input_size // model.patch_size * config.patch_size
        self._mean_311 = torch.tensor(PIXEL_MEAN, device=device).view(3, 1, 1)
        self._std_311 = torch.tensor(PIXEL_STD, device=device).view(3, 1, 1)

    def losses(self, features_BTF: Tensor, images_BCHW: Tensor) -> Tensor:
        """Minus the mean cosine between predicted and true features of each picture in [-1, 1], fp32 [B].

        A prediction shorter than LEAST_LENGTH counts as if it had that length: the gradient of a cosine has no bound at
        zero, and Adam's second moment would remember it for long.
        """
        predicted_BTF = features_BTF.float()
        length_BT1 = torch.linalg.vector_norm(predicted_BTF, dim=2, keepdim=True)
        predicted_BTF = predicted_BTF / length_BT1.clamp(min=LEAST_LENGTH)
        return -(predicted_BTF * normalize(self.encode(images_BCHW), dim=2)).sum(2).mean(1)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The encoder's features [B, T, F] of pictures in [-1, 1], after its last norm, in the order of the tokens."""
        size = (self._encoder_size, self._encoder_size)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            pixels = interpolate(images_BCHW.float(), size, mode="bicubic", antialias=True)
            pixels = ((pixels + 1) / 2 - self._mean_311) / self._std_311
            hidden: Tensor = self._encoder(pixel_values=pixels).last_hidden_state
        return hidden[:, -self._num_tokens :]  # before them come the class token and the registers


def load_encoder(folder: str) -> PreTrainedModel:
    """The DINOv2 of a transformers folder, frozen. Raises ValueError, which names the folder."""
    if not Path(folder).is_dir():
        raise ValueError(f"image encoder {folder}: no such folder; objective.repa.encoder is one with a DINOv2 in it")
    transformers_logging.disable_progress_bar()  # loading takes a moment only
    try:
        model_type = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if model_type not in MODEL_TYPES:
            raise ValueError(f"it is a {model_type}, not one of {', '.join(MODEL_TYPES)}")
        encoder, report = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers would go on with random values
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"image encoder {folder}: cannot be loaded: {' '.join(str(error).split())}") from error
    frozen: PreTrainedModel = encoder.eval().requires_grad_(False)
    return frozen
