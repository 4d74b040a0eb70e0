"""Where a curve of loss against learning rate is lowest, and how sure that is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from megadit.tuning.optimum import LrCurve, find_optimum


def curve(log2_lrs: list[float], losses: list[list[float]], diverged: tuple[float, ...] = ()) -> LrCurve:
    """Losses by seed, then learning rate."""
    return LrCurve(64, {}, [], [], np.array(log2_lrs), np.array(losses), diverged)


@settings(max_examples=200)
@given(
    minimum=st.floats(-8.9, -5.1),
    curvature=st.floats(0.01, 10),
    grid=st.lists(st.floats(-10, -4), min_size=3, max_size=9, unique_by=lambda x: round(x, 1)),
)
def test_the_minimum_of_a_parabola_is_found(minimum: float, curvature: float, grid: list[float]) -> None:
    lrs = sorted(grid)
    optimum = find_optimum(curve(lrs, [[0.3 + curvature * (lr - minimum) ** 2 for lr in lrs]]))
    if optimum.best in (lrs[0], lrs[-1]):
        assert (optimum.kind, optimum.fitted) == ("edge", None)
        assert optimum.estimate == optimum.best
    else:
        assert optimum.kind == "fitted"
        assert optimum.fitted == pytest.approx(minimum, abs=1e-3)


def test_it_is_the_parabola_that_numpy_fits() -> None:
    losses = [0.5, 0.34, 0.31, 0.36, 0.9]
    found = find_optimum(curve([-9, -8, -7, -6, -5], [losses])).fitted
    a, b, _ = np.polyfit([-8, -7, -6], losses[1:4], 2)
    assert found == pytest.approx(-b / (2 * a))


def test_uncertainty_is_the_spread_over_draws_of_whole_seeds() -> None:
    lrs = [-8.0, -7.0, -6.0]
    seeds = [[0.40, 0.30, 0.38], [0.41, 0.30, 0.34], [0.50, 0.40, 0.47]]
    exact = np.std(
        [
            find_optimum(curve(lrs, [np.mean([seeds[i] for i in draw], axis=0).tolist()])).fitted
            for draw in itertools.product(range(3), repeat=3)
        ]
    )
    found = find_optimum(curve(lrs, seeds)).uncertainty
    assert found == pytest.approx(exact, rel=0.05)
    assert find_optimum(curve(lrs, seeds[:1])).uncertainty is None
    # What all learning rates of a seed have in common is no uncertainty.
    shifted = [[loss + shift for loss in seeds[0]] for shift in (0.0, 0.5, 1.0)]
    assert find_optimum(curve(lrs, shifted)).uncertainty == pytest.approx(0, abs=1e-9)


def test_the_best_beside_a_rate_that_diverges_is_no_edge() -> None:
    optimum = find_optimum(curve([-9, -8, -7], [[0.5, 0.4, 0.3]], diverged=(-6.0,)))
    assert (optimum.kind, optimum.best, optimum.fitted) == ("cliff", -7, None)
    assert find_optimum(curve([-9, -8, -7], [[0.3, 0.4, 0.5]], diverged=(-6.0,))).kind == "edge"
    assert find_optimum(curve([-8, -7], [[0.4, 0.3]])).kind == "few"


def test_no_parabola_is_drawn_across_a_rate_that_diverges() -> None:
    assert find_optimum(curve([-9, -8, -6], [[0.5, 0.3, 0.4]], diverged=(-7.0,))).kind == "cliff"


def test_three_equal_losses_have_their_minimum_in_the_middle() -> None:
    optimum = find_optimum(curve([-9, -8, -7, -6, -5], [[0.3, 0.2, 0.2, 0.2, 0.3]]))
    assert optimum.kind == "fitted"
    assert -8 <= optimum.estimate <= -6
