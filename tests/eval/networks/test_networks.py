"""The networks against others' implementations on the same weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

from megadit.eval.networks import clip
from megadit.eval.networks.dinov2 import Dinov2Embedding, resize_positions
from megadit.eval.networks.efficientnet import EfficientNetEncoder, EfficientNetLite0
from megadit.eval.networks.inception import LOGITS, POOL, SPATIAL, Inception, InceptionEncoder
from megadit.eval.resize import RESIZERS

CPU = torch.device("cpu")


def randomise(network: nn.Module) -> None:
    """Weights and running statistics such that every branch counts and activations stay of order one."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(0, 0.1, generator=generator)
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        network = Inception()
    network = network.to_empty(device="cpu")
    network.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()})
    randomise(network)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_has_the_published_tensors(inception_file: Path) -> None:
    state = torch.load(inception_file)
    assert len(state) == 566
    assert sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()) == 23_885_392
    assert state["fc.weight"].shape == (1008, 2048) and state["Mixed_6d.branch1x1.conv.weight"].shape == (
        192,
        768,
        1,
        1,
    )


def test_inception_equals_torch_fidelity(
    import_fidelity: Callable, inception_file: Path, make_pixels: Callable
) -> None:
    """On the same random weights, from pixels on: its file loads here with all keys, and all three outputs agree."""
    theirs = import_fidelity("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    spatial = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, inputs, output: spatial.update(conv=output.clone()))
    pixels = [make_pixels(seed, 32, 32) for seed in range(2)]
    with torch.inference_mode():
        pool, logits = theirs(torch.stack([torch.from_numpy(image.transpose(2, 0, 1)) for image in pixels]))
        ours = InceptionEncoder(inception_file, CPU, RESIZERS["adm"])
        found = ours(torch.stack([ours.prepare(image) for image in pixels]), [])
    assert torch.equal(found[:, POOL], pool) and pool.std() > 1e-3
    assert torch.equal(found[:, LOGITS], logits)
    expected = (
        spatial["conv"].permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    )  # height, width, channel, as TensorFlow has it
    assert torch.equal(found[:, SPATIAL], expected) and expected.shape == (2, 2023) and expected.std() > 1e-3


def test_a_damaged_file_of_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: cannot be loaded: .*Missing key"):
        InceptionEncoder(tmp_path / "other.pth", CPU, RESIZERS["adm"])
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"cut.pth: cannot be loaded"):
        InceptionEncoder(tmp_path / "cut.pth", CPU, RESIZERS["adm"])


def test_efficientnet_equals_its_package(tmp_path: Path) -> None:
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch (requirements/tools.txt)"
    )
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "lite0.pth")
    ours = EfficientNetEncoder(tmp_path / "lite0.pth", CPU)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs.extract_features(x).mean(dim=(2, 3))
        torch.testing.assert_close(ours(x, []), expected, rtol=1e-5, atol=1e-6)
    assert sum(parameter.numel() for parameter in EfficientNetLite0().parameters()) == 4_652_008


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two layers with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=16,
        text_config={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "vocab_size": 10, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    _word_tokenizer().save_pretrained(folder)
    return folder


def _word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "</s>", "<unk>", "a", "red", "blue", "heart", "star", "of", "gold"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


PROMPTS = ["a red heart", "a blue star of gold", "gold " * 200]  # the last one is cut at 77 tokens


def test_clip_score_is_a_hundred_times_the_cosine(clip_folder: Path, make_pixels: Callable) -> None:
    """logits_per_image of transformers, on its own batch, brought from the learned scale to 100."""
    encoder = clip.ClipAgreement(clip_folder, CPU, clip.times_100)
    images = torch.stack([encoder.prepare(make_pixels(seed, 40, 40)) for seed in range(3)])
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = model(pixel_values=images, **tokens).logits_per_image.diag()
        learned = clip.ClipAgreement(clip_folder, CPU, clip.learned_scale)(images, PROMPTS)
        found = encoder(images, PROMPTS)
    torch.testing.assert_close(found[:, 0], 100 * logits / model.logit_scale.exp(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learned[:, 0], logits, rtol=1e-5, atol=1e-6)
    assert found.shape == (3, 1) and found.std() > 0.1


def test_clip_score_of_a_caption_does_not_depend_on_its_neighbours(clip_folder: Path, make_pixels: Callable) -> None:
    encoder = clip.ClipAgreement(clip_folder, CPU, clip.times_100)
    images = torch.stack([encoder.prepare(make_pixels(seed)) for seed in range(3)])
    with torch.inference_mode():
        together = encoder(images, PROMPTS)
        alone = torch.cat([encoder(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_clip_pictures_are_cropped_and_normalised_as_openai_does(clip_folder: Path) -> None:
    """Shorter side to 32, the middle of the longer one; the mean of the training data becomes zero."""
    encoder = clip.ClipAgreement(clip_folder, CPU, clip.times_100)
    level = np.round(np.array(clip.PIXEL_MEAN) * 255).astype(np.uint8)
    wide = np.zeros((20, 61, 3), dtype=np.uint8)
    wide[:, 21:41] = level  # the middle square; black is left of it and right
    found = encoder.prepare(wide)
    assert found.shape == (3, 32, 32) and found[:, :, 5:-5].abs().max() < 0.01
    assert encoder.prepare(np.zeros((20, 61, 3), np.uint8))[:, 0, 0].tolist() == pytest.approx(
        [-mean / std for mean, std in zip(clip.PIXEL_MEAN, clip.PIXEL_STD, strict=True)]
    )


def test_clip_pictures_are_scaled_by_the_shorter_side_and_cropped_to_the_centre() -> None:
    stripes = np.zeros((16, 48, 3), dtype=np.uint8)
    stripes[:, 16:32] = 255  # the middle third, black outside
    seen = clip.prepare(Image.fromarray(stripes), 16)
    assert seen.shape == (3, 16, 16)
    white = torch.tensor([(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711])
    assert torch.allclose(seen, white.view(3, 1, 1).expand(3, 16, 16))
    tall = clip.prepare(Image.new("RGB", (3, 300)), 16)
    assert tall.shape == (3, 16, 16)


def test_clip_score_without_its_tokenizer_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    """transformers would make an empty one, and every caption the same."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model 10"):
        clip.ClipAgreement(folder, CPU, clip.times_100)


def test_clip_embeddings_are_those_of_the_projection(clip_folder: Path, make_pixels: Callable) -> None:
    encoder = clip.ClipEmbedding(clip_folder, CPU)
    images = torch.stack([encoder.prepare(make_pixels(seed, 30, 50)) for seed in range(2)])
    assert images.shape == (2, 3, 32, 32)  # the whole picture, squeezed
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=images).pooler_output
        found = encoder(images, [])
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


def test_dinov2_gives_the_class_token_with_positions_of_the_original(tmp_path: Path, make_pixels: Callable) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    encoder = Dinov2Embedding(tmp_path, CPU)
    images = torch.stack([encoder.prepare(make_pixels(seed, 30, 50)) for seed in range(2)])
    assert images.shape == (2, 3, 224, 224)

    grid = model.embeddings.position_embeddings[:, 1:].reshape(1, 37, 37, 24).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # dinov2, vision_transformer.py
    table = torch.cat([model.embeddings.position_embeddings[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    with torch.inference_mode():
        by_transformers = model(pixel_values=images).last_hidden_state[:, 0]
        model.embeddings.position_embeddings = nn.Parameter(table)
        expected = model(pixel_values=images).last_hidden_state[:, 0]
        found = encoder(images, [])
    torch.testing.assert_close(found, expected)
    assert (found - by_transformers).abs().max() > 1e-4  # the offset is no rounding
    assert torch.equal(resize_positions(table, 16), table)


def test_pictures_for_dinov2_are_pils_bicubic() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    expected = (resized - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(Dinov2Embedding.prepare(None, image).permute(1, 2, 0), expected, atol=1e-5)  # type: ignore[arg-type]
