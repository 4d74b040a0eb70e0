"""Precision and recall against torch-fidelity's and all distances in float64, and ADM's rounding."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from megadit.eval.metrics import precision_recall as module
from megadit.eval.metrics.precision_recall import precision_recall, precision_recall_fp16


def plainly(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """The definition, from all squared distances in float64."""
    ours, theirs = features.double(), reference.double()

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(row - b).square().sum(dim=1) for row in a])

    across = squared(ours, theirs)
    our_radii, their_radii = (squared(x, x).sort(dim=1).values[:, 3] for x in (ours, theirs))
    precision = (across <= their_radii).any(dim=1).double().mean()
    return precision.item(), (across <= our_radii[:, None]).any(dim=0).double().mean().item()


def clouds(num: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=generator), 1.1 * torch.randn(num - 5, dim, generator=generator) + 0.05


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds and blocks that do not divide the sets of the tests, so that most balls need not be measured."""
    for name, rows in {"ROUND_ROWS": 7, "GROUP_ROWS": 5, "BLOCK_ROWS": 16}.items():
        monkeypatch.setattr(module, name, rows)


@pytest.mark.parametrize("rounds", ["one", "small_rounds"])
def test_equals_torch_fidelity(import_fidelity: Callable, request: pytest.FixtureRequest, rounds: str) -> None:
    if rounds != "one":
        request.getfixturevalue(rounds)
    ours, theirs = clouds(300, 24, 0)
    prc = import_fidelity("torch_fidelity.metric_prc")
    expected = prc.calculate_precision_recall_full(ours.double(), theirs.double())
    found = precision_recall(ours, theirs)
    assert (found.precision, found.recall) == pytest.approx(expected, abs=1e-7)  # it averages in float32
    assert 0 < found.recall < found.precision < 1  # a case in which both say something, and not the same


@given(
    seed=st.integers(0, 1000),
    dim=st.integers(1, 6),
    num=st.integers(9, 40),
    offset=st.sampled_from([0.0, 100.0, 3000.0]),
    step=st.sampled_from([1.0, 1e-3]),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decides_as_float64_does(small_rounds: None, seed: int, dim: int, num: int, offset: float, step: float) -> None:
    """On grids, where many distances are equal, with copies; far from zero, where float32 products lose digits."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 3, (2, num, dim), generator=generator).float() * step + offset
    found = precision_recall(points[0], points[1])
    assert (found.precision, found.recall) == plainly(points[0], points[1])


@pytest.mark.usefixtures("small_rounds")
@pytest.mark.parametrize("kind", ["isotropic", "clustered"])
@pytest.mark.parametrize(("num_theirs", "most"), [(40, 75), (300, 180)])
def test_not_all_balls_are_measured(kind: str, num_theirs: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And yet the shares are those of all distances, also of a set with copies of half of its pictures."""
    generator = torch.Generator().manual_seed(7)
    ours, theirs = torch.randn(300, 64, generator=generator), torch.randn(num_theirs, 64, generator=generator)
    if kind == "clustered":
        middles = 3 * torch.randn(20, 64, generator=generator)
        ours, theirs = (x + middles[torch.randint(20, (len(x),), generator=generator)] for x in (ours, theirs))
    measured: list[int] = []
    measure = module._Balls.measure

    def counted(balls: module._Balls, rows: Tensor) -> None:
        measured.extend(rows.tolist())
        measure(balls, rows)

    monkeypatch.setattr(module._Balls, "measure", counted)
    found = precision_recall(ours, theirs)
    assert (found.precision, found.recall) == plainly(ours, theirs)
    assert 0 < len(measured) - num_theirs < most
    copies = torch.cat([ours[:150], ours[:150]])
    found = precision_recall(copies, theirs)
    assert (found.precision, found.recall) == plainly(copies, theirs)


@pytest.mark.usefixtures("small_rounds")
@pytest.mark.parametrize("distinct", [1, 3, 60])
def test_identical_sets_contain_each_other(distinct: int) -> None:
    """Also of few distinct pictures, whose balls have radius 0, as of a model that has collapsed."""
    points = torch.randn(distinct, 16, generator=torch.Generator().manual_seed(0)).repeat(60 // distinct, 1)
    found = precision_recall(points, points.clone())
    assert (found.precision, found.recall) == (1.0, 1.0)
    apart = precision_recall(points, points + 100)
    assert (apart.precision, apart.recall) == (0.0, 0.0)


def test_equals_prdc() -> None:
    prdc = pytest.importorskip("prdc", reason="needs prdc (see requirements/tools.txt)")
    ours, theirs = clouds(300, 24, 0)
    expected = prdc.compute_prdc(theirs.double().numpy(), ours.double().numpy(), nearest_k=3)
    found = precision_recall(ours, theirs)
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]))


def test_float32_alone_would_decide_otherwise() -> None:
    """The case is hard enough: by float32's products alone, the share differs from float64's."""
    ours, theirs = (x + 1000 for x in clouds(200, 8, 3))
    square = [x.square().sum(1) for x in (ours, theirs)]
    across = square[0][:, None] + square[1] - 2 * ours @ theirs.T
    within = square[1][:, None] + square[1] - 2 * theirs @ theirs.T
    by_float32 = (across <= within.sort(dim=1).values[:, 3]).any(dim=1).float().mean().item()
    found = precision_recall(ours, theirs)
    assert (found.precision, found.recall) == plainly(ours, theirs)
    assert abs(by_float32 - found.precision) > 0.01


def test_rounding_to_float16_raises_the_shares() -> None:
    """facts of ADM's evaluator: at |x|^2 of several hundreds distances are rounded to halves, and ties become more."""
    generator = torch.Generator().manual_seed(4)
    ours, theirs = (torch.randn(600, 512, generator=generator) * scale for scale in (1.0, 1.003))
    plain, rounded = precision_recall(ours, theirs), precision_recall_fp16(ours, theirs)
    assert rounded.precision + rounded.recall > plain.precision + plain.recall
    assert abs(rounded.precision - plain.precision) < 0.05


def test_rounding_to_float16_follows_its_definition() -> None:
    """Every operation in numpy's float16, the sums of products in float32."""
    ours, theirs = clouds(60, 48, 5)

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.half(), b.half()
        squares = [(x * x).float().sum(1).half() for x in (a, b)]
        return squares[0][:, None] - 2 * (a.float() @ b.float().T).half() + squares[1]

    radii = [rounded(x, x).clamp_min(0).sort(dim=1).values[:, 3] for x in (ours, theirs)]
    across = rounded(ours, theirs).clamp_min(0)
    found = precision_recall_fp16(ours, theirs)
    assert found.precision == (across <= radii[1]).any(1).double().mean().item()
    assert found.recall == (across <= radii[0][:, None]).any(0).double().mean().item()


def test_distances_beyond_float16_are_taken_in_float32() -> None:
    ours, theirs = (300 * x for x in clouds(80, 16, 6))
    found = precision_recall_fp16(ours, theirs)
    assert (found.precision, found.recall) == plainly(ours, theirs)


@pytest.mark.parametrize("function", [precision_recall, precision_recall_fp16])
def test_sets_that_cannot_be_compared_are_refused(function: Callable) -> None:
    with pytest.raises(ValueError, match="more than 3 images in each set, not 3"):
        function(torch.zeros(10, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="4 and 5 features"):
        function(torch.zeros(10, 4), torch.zeros(10, 5))


def test_standard_error_is_that_of_a_share() -> None:
    found = precision_recall(*clouds(300, 24, 0))
    assert found.precision_stderr == pytest.approx((found.precision * (1 - found.precision) / 300) ** 0.5)
