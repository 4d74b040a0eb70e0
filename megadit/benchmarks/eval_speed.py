"""`megadit bench eval`: GFLOP/s of the networks, seconds to score vectors of 2048 features.

Networks have random weights; a plain matrix product of 2048 x 2048 in float32 is the baseline, timed in turn with each.
Floating-point operations are counted by torch (two for a multiply-add), not taken from a table.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from megadit.benchmarks.findings import Cell, Table
from megadit.benchmarks.pairs import time_pairs
from megadit.eval.metrics.frechet import Moments, frechet, frechet_stderr
from megadit.eval.metrics.precision_recall import precision_recall
from megadit.eval.networks.efficientnet import EfficientNetLite0
from megadit.eval.networks.inception import POOL_DIM, Inception

PRODUCT_SIZE = 2048
DINOV2_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
CLIP_B32_VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32}


def _clip_features(model: nn.Module) -> Callable[[Tensor], object]:
    assert isinstance(model, CLIPModel)
    return lambda images: model.get_image_features(pixel_values=images)


def _networks() -> dict[str, tuple[Callable[[], nn.Module], int, Callable[[nn.Module], Callable[[Tensor], object]]]]:
    """What to build, the size of its pictures, and how to call it."""
    return {
        "Inception of FID": (Inception, 299, lambda model: model),
        "EfficientNet-lite0": (EfficientNetLite0, 224, lambda model: model),
        "CLIP ViT-B/32": (
            lambda: CLIPModel(CLIPConfig(vision_config=CLIP_B32_VISION | {"intermediate_size": 3072})),
            224,
            _clip_features,
        ),
        "DINOv2 ViT-L/14": (
            lambda: Dinov2Model(Dinov2Config(image_size=224, **DINOV2_LARGE)),
            224,
            lambda model: model,
        ),
    }


@torch.inference_mode()
def bench_networks(batch_size: int, num_pairs: int) -> Table:
    """GFLOP an image, images/s, and GFLOP/s beside those of a matrix product."""
    matrix, rows = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE), []
    for name, (build, size, call) in _networks().items():
        network = call(build().eval())
        images = torch.randn(batch_size, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            network(images)
        gflop = counter.get_total_flops() / 1e9
        pairs = time_pairs(lambda: matrix @ matrix, lambda: network(images), num_pairs)  # noqa: B023, called in here
        speed = gflop / pairs.median_ms(1) * 1000
        product = 2 * PRODUCT_SIZE**3 / 1e9 / pairs.median_ms(0) * 1000
        rows.append(
            {
                "network": name,
                "GFLOP/image": gflop / batch_size,
                "images/s": batch_size / pairs.median_ms(1) * 1000,
                "GFLOP/s": speed,
                "ratio": speed / product,
            }
        )
    return Table("networks of evaluation, fp32", f"GFLOP/s of a product of {PRODUCT_SIZE} x {PRODUCT_SIZE}", rows)


def _isotropic(num: int, reference: bool, draws: torch.Generator) -> Tensor:
    """No structure: distances are as alike as can be."""
    return torch.randn(num, POOL_DIM, generator=draws).abs_() * (1.02 if reference else 1)


def _clustered(num: int, reference: bool, draws: torch.Generator) -> Tensor:
    """A thousand clusters, as of classes, in directions whose variance falls as that of pictures' features does."""
    deviations = torch.arange(1, POOL_DIM + 1) ** -0.5
    middles = torch.randn(1000, POOL_DIM, generator=torch.Generator().manual_seed(1))
    members = middles[torch.randint(1000, (num,), generator=draws)]
    return (members + torch.randn(num, POOL_DIM, generator=draws) * (1 if reference else 0.9)) * deviations


@torch.inference_mode()
def bench_scores(num_vectors: int, num_reference: int, draw: Callable[[int, bool, torch.Generator], Tensor]) -> Table:
    """The seconds, and CPU seconds, of a Frechet distance with its error and of precision and recall."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = draw(num_vectors, False, generator), draw(num_reference, True, generator)
    rows: list[dict[str, Cell]] = []
    with _timed("means and covariances, float64", rows):
        statistics, reference = (Moments.of(features).statistics() for features in (ours, theirs))
    with _timed("Frechet distance", rows):
        distance = frechet(statistics, reference)
    with _timed("its standard error", rows):
        frechet_stderr(ours, statistics, reference, distance.transport_DD)
    with _timed("precision and recall", rows):
        precision_recall(ours, theirs)
    total = sum(float(row["s"] or 0) for row in rows)
    kind = f"{num_vectors} {draw.__name__.strip('_')} vectors of {POOL_DIM} against {num_reference}"
    return Table(kind, "time of all of it", [row | {"ratio": float(row["s"] or 0) / total} for row in rows])


@contextmanager
def _timed(what: str, rows: list[dict[str, Cell]]) -> Iterator[None]:
    start, cpu_start = time.perf_counter(), time.process_time()
    yield
    rows.append({"what": what, "s": time.perf_counter() - start, "CPU s": time.process_time() - cpu_start})


def bench_eval(num_vectors: int, num_reference: int, batch_size: int, num_pairs: int) -> list[Table]:
    """The networks, then scores of vectors of either kind."""
    scores = [bench_scores(num_vectors, num_reference, draw) for draw in (_isotropic, _clustered)]
    return [bench_networks(batch_size, num_pairs), *scores]
