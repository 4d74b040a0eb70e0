"""Small data of the shape that shipped recipes ask for: real encoders with random weights, few pictures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import Dinov2Config, Dinov2Model, T5Config, T5EncoderModel, T5TokenizerFast

from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.packing.pack import pack
from megadit.data.packing.settings import PackSettings
from megadit.data.packing.sources import open_source
from megadit.objectives.image_encoder import ImageEncoder

FEW = ("subgroup=animal-bird", "skin_tone=false")  # 21 pictures
NARROW = 8  # features inside the encoders, whose inputs and outputs are as wide as real ones'
MAX_TOKENS = 120


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with features as wide as those of T5-XXL, 4096."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "t5"
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.:-"]
    T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0).save_pretrained(folder)
    sizes = {"d_model": 4096, "d_kv": NARROW, "d_ff": NARROW, "num_layers": 1, "num_heads": 1}
    T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of latent channels: an AutoencoderKL that makes each side an eighth."""
    folders = {}
    for channels in (4, 16):
        torch.manual_seed(0)
        folders[channels] = tmp_path_factory.mktemp("encoders") / f"vae-{channels}"
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        sizes = {"block_out_channels": [NARROW] * 4, "layers_per_block": 1, "norm_num_groups": 4}
        AutoencoderKL(**blocks, **sizes, latent_channels=channels).save_pretrained(folders[channels])
    return folders


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    """A DINOv2 of one layer, with as many features as DINOv2-B."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "dinov2"
    sizes = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return ImageEncoder.load(str(folder))


@pytest.fixture(scope="session")
def pack_latents(
    text_folder: Path,
    vae_folders: dict[int, Path],
    image_encoder: ImageEncoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int, int], Path]:
    """Latents of so many channels of pictures of so many pixels, classes, features of text and, beside 16 channels, of
    an image encoder; each is made once.
    """
    made: dict[tuple[int, int], Path] = {}

    def make(channels: int, pixels: int) -> Path:
        if (channels, pixels) not in made:
            folder = tmp_path_factory.mktemp(f"latents-{channels}-{pixels}")
            settings = PackSettings(
                size=pixels,
                holdout=8,
                where=FEW,
                label="caption",
                keep_pictures=False,
                text_dtype="int8",
                feature_dtype="int8",
            )
            device = torch.device("cpu")
            text = TextEncoder.load(str(text_folder), MAX_TOKENS, device, torch.float32)
            vae = Autoencoder.load(str(vae_folders[channels]), device, torch.float32)
            pack(open_source("emoji"), str(folder), settings, text, vae, image_encoder if channels == 16 else None)
            made[channels, pixels] = folder
        return made[channels, pixels]

    return make


@pytest.fixture(scope="session")
def pack_pixels(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Pictures of so many pixels, their subgroups as classes, features of MiniLM."""
    made: dict[int, Path] = {}

    def make(pixels: int) -> Path:
        if pixels not in made:
            made[pixels] = tmp_path_factory.mktemp(f"pixels-{pixels}")
            settings = PackSettings(size=pixels, holdout=8, where=FEW, label="subgroup")
            pack(open_source("emoji"), str(made[pixels]), settings, encoder)
        return made[pixels]

    return make
