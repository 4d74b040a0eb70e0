"""KID against torch-fidelity's, CMMD against its formula in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megadit.eval.metrics import mmd
from megadit.eval.metrics.mmd import cmmd, kid


def sets(num: int, dim: int, seed: int, shift: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, num, dim, generator=generator)
    return ours, theirs + shift


def test_kid_equals_torch_fidelity(import_fidelity: Callable) -> None:
    """The same subsets, so the same number but for float32 there."""
    ours, theirs = sets(200, 32, 0)
    found = kid(ours, theirs[:150], num_subsets=10, subset_size=50)
    expected = import_fidelity("torch_fidelity.metric_kid").kid_features_to_metric(
        ours.double(), theirs[:150].double(), kid_subsets=10, kid_subset_size=50, verbose=False
    )
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    scale = (50 / 100) ** 0.5  # delete-d jackknife: 50 kept of 150
    assert found.stderr == pytest.approx(scale * expected["kernel_inception_distance_std"], rel=1e-9)


def test_kid_is_unbiased() -> None:
    """Its mean over pairs of sets of one distribution is zero, within their spread."""
    values = torch.tensor([kid(*sets(60, 8, seed, 0.0), num_subsets=1, subset_size=60).value for seed in range(200)])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5


def test_kid_without_enough_images_is_refused() -> None:
    with pytest.raises(ValueError, match="subsets of 1000 images; there are 60 and 60"):
        kid(*sets(60, 8, 0))


def test_kid_of_whole_sets_has_no_standard_error() -> None:
    assert kid(*sets(30, 4, 0), num_subsets=2, subset_size=30).stderr is None


@pytest.mark.parametrize("block_rows", [2048, 17])
def test_cmmd_equals_its_formula(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    """cmmd-pytorch's formula, in float64: biased, diagonals included, times 1000."""
    monkeypatch.setattr(mmd, "BLOCK_ROWS", block_rows)
    ours, theirs = (normalize(x, dim=1) for x in sets(120, 32, 1))
    theirs = theirs[:90]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a.double()[:, None] - b.double()).square().sum(-1) / 200).mean()

    expected = 1000 * (kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs))
    assert cmmd(ours, theirs).value == pytest.approx(expected.item(), rel=1e-5)


def test_cmmd_of_a_set_with_itself_is_zero() -> None:
    ours = normalize(sets(100, 16, 2)[0], dim=1)
    assert abs(cmmd(ours, ours).value) < 1e-6


def test_cmmd_standard_error_is_what_new_samples_show() -> None:
    reference = normalize(sets(300, 6, 3, 1.0)[1], dim=1)
    found = [cmmd(normalize(sets(150, 6, 10 + seed)[0], dim=1), reference) for seed in range(150)]
    spread = torch.tensor([discrepancy.value for discrepancy in found]).std().item()
    assert torch.tensor([discrepancy.stderr for discrepancy in found]).mean().item() == pytest.approx(spread, rel=0.2)
