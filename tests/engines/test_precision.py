"""How matrices are multiplied: fp32 exactly, TF32 on GPUs alone, bf16."""

from collections.abc import Callable, Iterator

import pytest
import torch

from megadit import engines
from megadit.distributed import ALONE
from megadit.recipe import Recipe, plan
from megadit.training.reporter import banner

PRECISIONS = ("fp32", "tf32", "bf16")


@pytest.fixture
def tf32_switch() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32_switch")
def test_tf32_products_are_on_for_tf32_alone(tiny_recipe: Callable[..., Recipe]) -> None:
    for precision in ("tf32", "fp32", "tf32", "bf16"):
        engines.build(tiny_recipe(f"training.precision={precision}"), ALONE)
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")


def test_a_cpu_says_that_it_computes_tf32_in_fp32(tiny_recipe: Callable[..., Recipe]) -> None:
    stages = {precision: plan(tiny_recipe(f"training.precision={precision}"))[0] for precision in PRECISIONS}
    said = {precision: banner(stage, [], 1, ALONE) for precision, stage in stages.items()}
    assert "fp32 (tf32 is for GPUs) matrix products" in said["tf32"]
    assert "CPU (peak unknown: MFU n/a), fp32 matrix products" in said["fp32"]
    assert "bf16 matrix products" in said["bf16"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("tf32_switch")
def test_a_gpu_rounds_as_tf32_does(tiny_recipe: Callable[..., Recipe]) -> None:
    """Ten bits of mantissa: products of numbers near 1 are off by about 2^-11 each."""
    a, b = (torch.rand(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) for seed in (0, 1))
    exact, error = a.double() @ b.double(), {}
    for precision in ("fp32", "tf32"):
        engines.build(tiny_recipe(f"training.precision={precision}"), ALONE)
        error[precision] = ((a @ b - exact).abs() / exact).max().item()
    assert error["fp32"] < 1e-5 < error["tf32"] < 1e-2
