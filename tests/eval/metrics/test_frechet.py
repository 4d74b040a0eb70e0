"""The Frechet distance against closed forms, torch-fidelity and torchmetrics; its statistics, files and uncertainty."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from megadit.eval.metrics.frechet import (
    Moments,
    Statistics,
    frechet,
    frechet_stderr,
    load_statistics,
    save_statistics,
)


def features_of(num: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1000)) / dim**0.5
    return torch.randn(num, dim, generator=generator).relu() @ mixing + shift


def test_closed_form_of_two_normal_distributions() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    ours = Statistics(torch.zeros(4, dtype=torch.float64), eye, None)
    reference = Statistics(torch.ones(4, dtype=torch.float64), 2 * eye, None)
    assert frechet(ours, reference).value == pytest.approx(4 + 4 + 8 - 8 * 2**0.5, abs=1e-13)
    assert frechet(ours, reference).value == pytest.approx(4.686291501015239, abs=1e-13)


def test_commuting_covariances_are_compared_by_their_eigenvalues() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    first, second = torch.tensor([4.0, 1, 0.5, 9, 0, 2]), torch.tensor([1.0, 1, 2, 4, 3, 0])
    zeros = torch.zeros(6, dtype=torch.float64)
    ours, reference = (Statistics(zeros, (basis * values) @ basis.T, None) for values in (first, second))
    assert frechet(ours, reference).value == pytest.approx(float((first.sqrt() - second.sqrt()).square().sum()), 1e-7)


def test_equals_torch_fidelity_and_torchmetrics(import_fidelity: Callable) -> None:
    """On 300 vectors of 64 features each, where the covariances have full rank."""
    ours, theirs = features_of(300, 64, 0), features_of(250, 64, 1, 0.1)
    fid = import_fidelity("torch_fidelity.metric_fid")
    theirs_statistics = [fid.fid_features_to_statistics(features.double()) for features in (ours, theirs)]
    expected = fid.fid_statistics_to_metric(*theirs_statistics, verbose=False)["frechet_inception_distance"]
    mine = [Moments.of(features).statistics() for features in (ours, theirs)]
    assert frechet(*mine).value == pytest.approx(expected, rel=1e-10)

    from torchmetrics.image.fid import _compute_fid  # imports torch-fidelity, so not before it could be

    again = _compute_fid(mine[0].mu, mine[0].sigma, mine[1].mu, mine[1].sigma)
    assert frechet(*mine).value == pytest.approx(float(again), rel=1e-10)


def test_fewer_images_than_features_equals_the_nuclear_norm_form() -> None:
    """tr (S1 S2)^(1/2) = |Xc Yc'|_* / sqrt((n - 1)(m - 1)): exact where the covariances are singular."""
    ours, theirs = features_of(20, 64, 2).double(), features_of(30, 64, 3).double()
    centred = [features - features.mean(0) for features in (ours, theirs)]
    covariances = [features.T @ features / (len(features) - 1) for features in centred]
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / (19 * 29) ** 0.5
    expected = (ours.mean(0) - theirs.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * root
    found = frechet(Moments.of(ours).statistics(), Moments.of(theirs).statistics()).value
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_a_set_against_itself_is_at_no_distance() -> None:
    statistics = Moments.of(features_of(500, 32, 4)).statistics()
    assert abs(frechet(statistics, statistics).value) < 1e-10


@given(cuts=st.lists(st.integers(1, 199), max_size=4, unique=True), mean=st.sampled_from([0.0, 50.0, 1000.0]))
@settings(max_examples=30, deadline=None)
def test_moments_merge_to_those_of_the_whole(cuts: list[int], mean: float) -> None:
    """However it is cut; a mean of 1000 is what makes sums of squares lose their digits."""
    features = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + mean
    bounds = [0, *sorted(cuts), 200]
    parts = [Moments.of(features[start:end]) for start, end in pairwise(bounds)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.num == 200
    np.testing.assert_allclose(merged.statistics().mu, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.statistics().sigma, np.cov(features.numpy(), rowvar=False), rtol=0, atol=1e-11)


def test_float32_features_are_summed_in_float64() -> None:
    features = (torch.randn(20_000, 3, generator=torch.Generator().manual_seed(6)) * 0.01 + 50).float()
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(Moments.of(features).statistics().sigma, expected, rtol=1e-9)


def test_standard_error_is_what_new_samples_show() -> None:
    """The spread of the distance over 300 fresh sets of 400 vectors, against the estimate from one of them."""
    reference = Moments.of(features_of(20_000, 8, 7)).statistics()
    sets = [features_of(400, 8, 100 + seed, shift=0.15) for seed in range(300)]
    values, errors = [], []
    for features in sets:
        statistics = Moments.of(features).statistics()
        distance = frechet(statistics, reference)
        values.append(distance.value)
        errors.append(frechet_stderr(features, statistics, reference, distance.transport_DD))
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.tensor(values).std().item(), rel=0.1)


def test_no_standard_error_without_full_rank() -> None:
    features = features_of(16, 16, 8)
    statistics = Moments.of(features).statistics()
    distance = frechet(statistics, statistics)
    assert frechet_stderr(features, statistics, statistics, distance.transport_DD) is None


def test_files_come_back_and_other_tools_read_them(tmp_path: Path) -> None:
    statistics = Moments.of(features_of(50, 6, 9)).statistics()
    save_statistics(tmp_path / "deep" / "stats.npz", statistics, "net/adm", "_s")
    back = load_statistics(tmp_path / "deep" / "stats.npz", "net/adm", "_s", 6)
    assert torch.equal(back.mu, statistics.mu) and torch.equal(back.sigma, statistics.sigma) and back.num == 50
    with np.load(tmp_path / "deep" / "stats.npz") as arrays:
        assert arrays["mu_s"].dtype == arrays["sigma_s"].dtype == np.float64


def test_a_file_of_another_tool_needs_only_mu_and_sigma(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4), arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    found = load_statistics(tmp_path / "adm.npz", "net/adm", "", 4)
    assert found.mu.dtype == torch.float64 and found.num is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "where net/adm has 4 features"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"sigma \(5, 5\)"),
        ({"mu": np.zeros(4)}, "no sigma in it, but mu"),
        ({"mu": np.zeros(4), "sigma": np.full((4, 4), np.nan)}, "not all numbers are finite"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(4), "features": np.array("net/clean")},
            "are of net/clean, not of net/adm",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_statistics(tmp_path / "stats.npz", "net/adm", "", 4)


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stats.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"stats.npz cannot be read"):
        load_statistics(tmp_path / "stats.npz", "net/adm", "", 4)


def test_statistics_of_two_networks_are_not_compared() -> None:
    with pytest.raises(ValueError, match="4 and of 6 features"):
        frechet(*(Moments.of(features_of(20, dim, 0)).statistics() for dim in (4, 6)))
