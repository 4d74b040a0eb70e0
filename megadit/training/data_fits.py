"""Whether a model can be trained on a data set: said before anything is built, with what is lacking."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.format.buckets import bucket_table
from megadit.data.format.manifest import CAPTION, Manifest, parse_bucket
from megadit.objectives.image_encoder import ImageEncoder
from megadit.recipe import Recipe

AREA_RANGE = 1.5  # tables of buckets keep the area of their square to a few per cent


@dataclass(frozen=True)
class _Text:
    """Text features that the model gets, cached or encoded as they come."""

    dim: int
    pooled_dim: int
    max_tokens: int


def check_data_fits(recipe: Recipe, manifest: Manifest, validation: Manifest | None = None) -> None:
    """Raise ValueError unless the model takes what the data sets have, after the online encoders of the recipe.

    Of these only the configurations are read. The validation set must be encoded as the training set is.
    """
    _check_set(recipe, manifest, f"the data at {recipe.data.url}")
    if validation is not None:
        where = f"the validation data at {recipe.data.validation_url}"
        _check_set(recipe, validation, where)
        _require_same_identity(manifest, validation, where, recipe.data.url)


def require_one_encoding(first: Recipe, manifest: Manifest, later: Recipe, manifest_later: Manifest) -> None:
    """Raise ValueError unless the data of a later stage is encoded as that of the first of a run."""
    _require_same_identity(manifest, manifest_later, f"the data at {later.data.url}", first.data.url)


def _require_same_identity(manifest: Manifest, other: Manifest, where: str, url: str) -> None:
    ours, theirs = _identity(manifest), _identity(other)
    if differing := [name for name, facts in ours.items() if facts != theirs[name]]:
        raise ValueError(f"{where} has other {' and '.join(differing)} than the data at {url}")


def _identity(manifest: Manifest) -> dict[str, object]:
    """What two data sets of one run must have in common, by what it is called."""
    latent, text, features = manifest.latent, manifest.text, manifest.features
    return {
        "latents": latent and (latent.weights_sha256, latent.scaling_factor, latent.shift_factor),
        "text features": text and text.weights_sha256,
        "image features": features and features.weights_sha256,
        "classes": manifest.labels,
    }


def _check_set(recipe: Recipe, manifest: Manifest, where: str) -> None:
    model, taken = recipe.model, recipe.model.conditions
    sizes, channels = _inputs(recipe, manifest, where)
    pairs = {"in_channels": (model.in_channels, channels), "num_classes": (taken.num_classes, len(manifest.labels))}
    if len(sizes) == 1 and sizes[0][0] == sizes[0][1]:
        pairs = {"input_size": (model.input_size, sizes[0][0]), **pairs}
    else:
        _check_buckets(recipe, sizes, where)
    if taken.text_dim is not None:
        text = _text(recipe, manifest, where)
        pairs |= {"text_dim": (taken.text_dim, text.dim), "pooled_dim": (taken.pooled_dim, text.pooled_dim)}
        if taken.max_text_tokens is not None and taken.max_text_tokens < text.max_tokens:
            raise ValueError(
                f"{where} has captions of up to {text.max_tokens} tokens, "
                f"the model takes model.max_text_tokens {taken.max_text_tokens}"
            )
    elif recipe.encoders is not None and recipe.encoders.text is not None:
        raise ValueError(f"encoders.text is of no use: model.family {model.family} takes no captions")
    wrong = [
        f"model.{key} is {ours}, the data has {theirs}"
        for key, (ours, theirs) in pairs.items()
        if ours is not None and ours != theirs
    ]
    if wrong:
        raise ValueError(f"the model does not fit {where}: {'; '.join(wrong)}")
    if recipe.objective.needs_features is not None:
        _check_features(recipe, manifest, where, recipe.objective.needs_features)


def _check_features(recipe: Recipe, manifest: Manifest, where: str, key: str) -> None:
    """They are stored, or there are pictures and an encoder to compute them with."""
    model, encoder, stored = recipe.model, recipe.objective.image_encoder, manifest.features
    if stored is not None and encoder is not None:
        raise ValueError(f"{where} has features of its pictures already (of {stored.encoder}); leave {key}.encoder out")
    if stored is not None:
        if stored.dim != model.feature_dim:
            raise ValueError(f"{where} has {stored.dim} image features, model.repa.feature_dim is {model.feature_dim}")
        if stored.grid**2 != model.num_patches:
            side = math.isqrt(model.num_patches)
            raise ValueError(
                f"{where} has image features of {stored.grid}x{stored.grid} patches, the model has {side}x{side} "
                f"tokens; pack it with --feature-grid {side}"
            )
    elif manifest.image is None:
        raise ValueError(
            f"{where} has latents alone, and {key} needs features of the pictures: pack it with --features, or keep "
            f"the pictures and state {key}.encoder"
        )
    elif encoder is None:
        raise ValueError(
            f"{where} has no features of its pictures: state {key}.encoder, the folder of a DINOv2, or pack it with "
            "--features"
        )
    elif (dim := ImageEncoder.hidden_size(encoder)) != model.feature_dim:
        raise ValueError(
            f"image encoder {encoder}: it has {dim} features, model.repa.feature_dim is {model.feature_dim}"
        )


def _check_buckets(recipe: Recipe, sizes: Sequence[tuple[int, int]], where: str) -> None:
    """Each has whole patches, and about as many tokens as the square that the model is named after."""
    model = recipe.model
    uneven = [size for size in sizes if size[0] % model.patch_size or size[1] % model.patch_size]
    if uneven:
        raise ValueError(
            f"{where} has sizes that model.patch_size {model.patch_size} does not divide: {_names(uneven)}"
        )
    far = [size for size in sizes if not 1 / AREA_RANGE <= math.prod(size) / model.input_size**2 <= AREA_RANGE]
    if far:
        raise ValueError(
            f"{where} has resolution buckets of far more or fewer tokens than model.input_size {model.input_size}: "
            f"{_names(far)}"
        )
    if key := recipe.objective.needs_squares:
        raise ValueError(f"{key} takes squares of one size; {where} has {_names(sizes)}")


def _inputs(recipe: Recipe, manifest: Manifest, where: str) -> tuple[list[tuple[int, int]], int]:
    """Heights and widths that the model sees, and their channels."""
    pixels, vae = _pixels(recipe, manifest, where), recipe.encoders.vae if recipe.encoders else None
    if manifest.latent is not None and vae is not None:
        raise ValueError(f"{where} has latents already (of {manifest.latent.encoder}); leave encoders.vae out")
    if manifest.latent is not None:
        channels, downsampling = manifest.latent.channels, manifest.latent.downsampling
    elif vae is not None:
        channels, downsampling = Autoencoder.latent_shape(vae)
    else:
        assert manifest.image is not None, "a data set has pictures or latents"
        channels, downsampling = manifest.image.channels, 1
    odd = [size for size in pixels if size[0] % downsampling or size[1] % downsampling]
    if odd:
        raise ValueError(
            f"{where} has pictures of {_names(odd)} pixels, no multiples of the {downsampling} of a latent"
        )
    return [(height // downsampling, width // downsampling) for height, width in pixels], channels


def _pixels(recipe: Recipe, manifest: Manifest, where: str) -> list[tuple[int, int]]:
    """Heights and widths of the pictures."""
    if manifest.buckets():
        return [parse_bucket(bucket) for bucket in manifest.buckets()]
    if recipe.data.resolution is None:
        raise ValueError(f"{where} has pictures of their own sizes; state data.resolution, the pixels of a side")
    if recipe.data.aspect_buckets:
        return bucket_table(recipe.data.resolution)
    return [(recipe.data.resolution, recipe.data.resolution)]


def _names(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sizes)


def _text(recipe: Recipe, manifest: Manifest, where: str) -> _Text:
    online = recipe.encoders.text if recipe.encoders else None
    if manifest.text is not None and online is not None:
        raise ValueError(f"{where} has text features already (of {manifest.text.encoder}); leave encoders.text out")
    if manifest.text is not None:
        return _Text(manifest.text.dim, manifest.text.pooled_dim, manifest.text.max_tokens)
    if CAPTION not in manifest.members:
        raise ValueError(f"{where} has no captions, which the model needs; join them (`megadit data caption`)")
    if online is None:
        raise ValueError(f"{where} has captions and no features of them; state encoders.text to encode them")
    assert recipe.encoders is not None
    dim = TextEncoder.hidden_size(online)
    return _Text(dim, dim, recipe.encoders.max_tokens)
