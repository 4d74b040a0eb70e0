"""Model FLOPs against what PyTorch counts while it trains, and the table of peaks."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megadit import models, objectives
from megadit.engines.blocks import prepare_blocks
from megadit.models import ModelConfig
from megadit.models.dit import DiTConfig
from megadit.models.mmdit import MMDiTConfig, RepaHeadConfig
from megadit.models.pixart import PixArtConfig
from megadit.planning.ceilings import PEAK_TFLOPS, peak_flops
from megadit.planning.flops import step_flops, training_flops, training_tokens
from megadit.planning.synthetic_batch import synthetic_batch
from megadit.recipe import Recipe, load

SIZES = {"input_size": 16, "in_channels": 4, "patch_size": 2, "width": 64, "depth": 3, "head_dim": 16}
DIT = DiTConfig(family="dit", num_classes=5, **SIZES)
PIXART = PixArtConfig(family="pixart", text_dim=32, **SIZES)
MMDIT = MMDiTConfig(family="mmdit", text_dim=32, pooled_dim=24, **SIZES)


def of_model(config: ModelConfig, level: str | int) -> Recipe:
    """A recipe that trains a model of this configuration on two samples a step."""
    recipe = load("quickstart" if config.family == "mmdit" else "dit-mup-search-cpu")
    training = recipe.training.model_copy(update={"batch_size": 2})
    engine = recipe.engine.model_copy(update={"activation_checkpointing": level})
    return recipe.model_copy(update={"model": config, "training": training, "engine": engine})


@pytest.mark.parametrize("level", ["none", "selective", "full", 2])
@pytest.mark.parametrize("config", [DIT, PIXART, MMDIT], ids=["dit", "pixart", "mmdit"])
def test_a_training_step_has_the_flops_that_torch_counts(config: ModelConfig, level: str | int) -> None:
    recipe = of_model(config, level)
    model = models.build(config)
    prepare_blocks(model, recipe.engine)
    batch = synthetic_batch(recipe, 2, 7, torch.device("cpu"))
    objective = objectives.build(recipe.objective, recipe.model, torch.device("cpu"))
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective.losses(model, batch, objective.timesteps(batch.timestep_uniform)).total_B.mean().backward()
    expected = step_flops(recipe, 1, 7)
    assert expected.computed == counter.get_total_flops()
    assert expected.model == training_flops(config, [7, 7])
    assert (expected.computed > expected.model) == (level in ("full", 2))


def test_the_head_of_repa_counts() -> None:
    """Three layers on the image tokens, whose forward and backward passes are three products each."""
    head = MMDIT.model_copy(update={"repa": RepaHeadConfig(block=2, feature_dim=24)})
    products = MMDIT.num_patches * (2 * 64 * 64 + 64 * 24)
    assert training_flops(head, [7]) - training_flops(MMDIT, [7]) == 3 * 2 * products


def test_text_counts_where_the_model_takes_it() -> None:
    patches = (16 // 2) ** 2
    assert training_tokens(DIT, [7, 9]) == 2 * patches
    assert training_tokens(MMDIT, [7, 9]) == 2 * patches + 16
    assert training_flops(DIT, [7]) == training_flops(DIT, [0])
    assert training_flops(MMDIT, [7, 9]) == training_flops(MMDIT, [7]) + training_flops(MMDIT, [9])


def test_dit_xl_2_has_the_published_flops() -> None:
    """118.64 multiply-adds of a forward pass in arXiv 2212.09748, table 4; two FLOP each, three passes."""
    config = load("dit-xl2-sp").model
    assert training_flops(config, [0]) == pytest.approx(6 * 118.64e9, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_the_peak_of_a_known_device(name: str, part: str) -> None:
    bf16, fp32 = PEAK_TFLOPS[part]["bf16"], PEAK_TFLOPS[part]["fp32"]
    assert peak_flops(name, "bf16") == bf16 * 1e12
    assert peak_flops(name, "fp32") == fp32 * 1e12


@pytest.mark.parametrize(
    "name", ["CPU", "NVIDIA GeForce RTX 3060", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA T4", ""]
)
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None
