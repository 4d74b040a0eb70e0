"""What a pack is asked for."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

PIXELS_PER_TOKEN = 16  # a side: latents at an eighth of the pixels, in patches of 2
# Settings that say nothing where there are no features, and that FeatureFacts state where there are.
OF_FEATURES = ("feature_dtype", "feature_grid")
PictureFormat = Literal["png", "jpg"]


class PackError(ValueError):
    """Settings that cannot be packed, or a destination that has something else."""


@dataclass(frozen=True)
class PackSettings:
    """The settings of `megadit data pack`. Raises PackError.

    size: side in pixels of the square pictures (centre crop, then Lanczos); with aspect_buckets, of the square bucket.
    seed: of the shuffle and of the draws of sampled latents. holdout: about one concept in `holdout` goes to
    validation, chosen by a hash of the concept alone; 0: none. where: conditions `field=value` on the metadata. label:
    the field of the metadata whose texts are the classes. latents: mean and std, or one sample of each.
    encoder_precision: in which the encoders were loaded. feature_grid: patches of the image encoder a side, as many as
    the model has tokens; None: one for each PIXELS_PER_TOKEN pixels.
    """

    size: int
    aspect_buckets: bool = False
    seed: int = 0
    shard_samples: int = 512
    holdout: int = 32
    where: tuple[str, ...] = ()
    label: str | None = None
    keep_pictures: bool = True
    picture_format: PictureFormat = "png"
    latents: Literal["moments", "sample"] = "moments"
    latent_dtype: Literal["float16", "bfloat16"] = "float16"
    text_dtype: Literal["float16", "int8"] = "float16"
    feature_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    feature_grid: int | None = None
    encoder_precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("size", "shard_samples"):
            if getattr(self, name) < 1:
                raise PackError(f"{name} {getattr(self, name)} must be at least 1")
        if self.feature_grid is not None and self.feature_grid < 1:
            raise PackError(f"feature_grid {self.feature_grid} must be at least 1")
        if self.holdout < 0 or self.holdout == 1:
            raise PackError(f"holdout {self.holdout} must be at least 2, or 0 for no validation")

    def facts(self) -> dict[str, Any]:
        """Everything but OF_FEATURES as JSON values; the order of conditions makes no difference."""
        facts = {name: value for name, value in asdict(self).items() if name not in OF_FEATURES}
        return facts | {"where": sorted(self.where)}
