"""Pictures to features of their patches, by a frozen DINOv2 read from this machine: what REPA aligns with.

Packing stores the features and training computes them where they are not stored; both show it pictures in this way.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from megadit.checksums import sha256_of

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# Of ImageNet's pictures in [0, 1], as in the preprocessor_config.json of facebook/dinov2-base.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageEncoder:
    """A frozen DINOv2 with `dim` features of each patch; `name` is that of its folder."""

    def __init__(self, network: PreTrainedModel, folder: Path) -> None:
        self._network, self._folder = network.eval().requires_grad_(False), folder
        self.name, self.dim = folder.resolve().name, int(network.config.hidden_size)
        self._mean_311 = torch.tensor(PIXEL_MEAN, device=network.device).view(3, 1, 1)
        self._std_311 = torch.tensor(PIXEL_STD, device=network.device).view(3, 1, 1)

    @staticmethod
    def load(folder: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> "ImageEncoder":
        """The DINOv2 of a transformers folder. Raises ValueError, which names the folder."""
        transformers_logging.disable_progress_bar()  # loading takes a moment only
        with _loading(folder) as path:
            _config(path)
            network, report = AutoModel.from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
            if report["missing_keys"]:  # transformers would go on with random values
                raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        return ImageEncoder(network.to(device), path)

    @staticmethod
    def hidden_size(folder: str) -> int:
        """`dim` of an encoder, without its weights. Raises ValueError, which names the folder."""
        with _loading(folder) as path:
            return int(_config(path).hidden_size)

    @staticmethod
    def sha256_of_weights(folder: str) -> str:
        """`weights_sha256` of an encoder that need not be loaded. Raises ValueError, which names the folder."""
        with _loading(folder) as path:
            return sha256_of(*sorted(path.glob("*.safetensors")))

    @property
    def weights_sha256(self) -> str:
        """The sha256 of the files of its weights, read anew."""
        return self.sha256_of_weights(str(self._folder))

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor, grid: int) -> Tensor:
        """The features of square pictures in [-1, 1], float32 [B, grid * grid, dim], after the last norm.

        The pictures are resized so that they have `grid` patches a side; the patches are in the order of rows.
        """
        size = grid * self._network.config.patch_size
        with torch.autocast(images_B3HW.device.type, enabled=False):
            pixels = interpolate(images_B3HW.float(), (size, size), mode="bicubic", antialias=True)
            pixels = ((pixels + 1) / 2 - self._mean_311) / self._std_311
            hidden: Tensor = self._network(pixel_values=pixels.to(self._network.dtype)).last_hidden_state
        return hidden[:, -(grid**2) :].float()  # before them come the class token and the registers


class EncoderCost(NamedTuple):
    num_parameters: int
    forward_flops: int  # of one picture; a multiply-add is two


def encoder_cost(config: PretrainedConfig, grid: int) -> EncoderCost:
    """What a DINOv2 of `config` costs that sees a picture as `grid` x `grid` patches; nothing is computed.

    `Dinov2Config()` is that of DINOv2-B.
    """
    with torch.device("meta"):
        network = AutoModel.from_config(config, attn_implementation="eager").eval()
        pixels = torch.empty(1, 3, grid * config.patch_size, grid * config.patch_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(pixel_values=pixels)
    return EncoderCost(sum(weight.numel() for weight in network.parameters()), counter.get_total_flops())


def _config(path: Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"it is a {config.model_type}, not one of {', '.join(MODEL_TYPES)}")
    return config


@contextlib.contextmanager
def _loading(folder: str) -> Iterator[Path]:
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"image encoder {folder}: no such folder; give one with a DINOv2 of transformers")
    try:
        yield path
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"image encoder {folder}: cannot be loaded: {' '.join(str(error).split())}") from error
