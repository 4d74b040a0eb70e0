"""One rank of a scoring job on a small network; `delay_seconds` a batch gives time to kill it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megadit.checksums import sha256_of
from megadit.distributed import process_group
from megadit.eval import scoring
from megadit.eval.features import FeatureSet, FeatureSettings
from megadit.eval.metrics.catalogue import Compares, Metric
from megadit.eval.weights import WeightFile, load_file

WIDTH = 6


class SmallEncoder:
    """Two convolutions, whose weights are a real file."""

    def __init__(self, path: Path, device: torch.device, delay_seconds: float) -> None:
        self._network = network()
        load_file(self._network, path)
        self._delay_seconds = delay_seconds

    def prepare(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 128 - 1

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(self._delay_seconds)
        return self._network(images).flatten(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.GELU(), nn.Conv2d(16, WIDTH, 3), nn.AdaptiveAvgPool2d(1))


def write_weights(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    torch.save(network().state_dict(), folder / "small.pth")


def small_metric(weights: Path, delay_seconds: float = 0.0) -> Metric:
    """A Frechet distance on the small network."""
    file = WeightFile("small.pth", sha256_of(weights / "small.pth"), "this test")
    features = FeatureSet("small", WIDTH, file, lambda path, device: SmallEncoder(path, device, delay_seconds))
    return Metric("frechet_small", features, Compares.STATISTICS, id="frechet/small")


def main(
    folder: Path, reference: Path, weights: Path, delay_seconds: float = 0.0, batch_size: int = 4
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with process_group(needed=False) as topology:
        metric = small_metric(weights, delay_seconds)
        return scoring.score_metric(metric, folder, weights, reference, FeatureSettings(batch_size, topology))
