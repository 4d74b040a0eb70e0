"""The Inception score against torch-fidelity's."""

from collections.abc import Callable

import pytest
import torch

from megadit.eval.metrics.inception_score import inception_score


@pytest.mark.parametrize("num", [100, 997])
def test_equals_torch_fidelity(import_fidelity: Callable, num: int) -> None:
    logits = 3 * torch.randn(num, 40, generator=torch.Generator().manual_seed(0))
    expected = import_fidelity("torch_fidelity.metric_isc").isc_features_to_metric(logits)
    found = inception_score(logits)
    assert found.value == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_pictures_sorted_by_class_score_as_shuffled_ones_do() -> None:
    """100 classes, sure predictions: the score is nearly 100, and at most 10 where a split sees a tenth of them."""
    classes = torch.arange(10_000) // 100
    logits = 12.0 * torch.nn.functional.one_hot(classes, 100)
    assert inception_score(logits).value > 80


def test_one_prediction_for_all_scores_one() -> None:
    assert inception_score(torch.randn(1, 30).expand(50, 30)).value == pytest.approx(1, abs=1e-12)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 20 images, not 19"):
        inception_score(torch.zeros(19, 10))
