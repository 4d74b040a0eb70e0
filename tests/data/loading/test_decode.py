import io

import numpy as np
import pytest
from hypothesis import given, settings as effort, strategies as st
from PIL import Image

from megadit.data.format.manifest import LatentFacts, TextFacts
from megadit.data.loading.decode import DecodeError, decode_array, decode_latent, decode_picture, decode_text


def encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards: where a pixel of a crop comes from can be read off."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [255 * (columns + 0.5) / width, 255 * (rows + 0.5) / height, np.full((height, width), 128.0)]
    return np.stack(planes, axis=-1).astype(np.uint8)


@effort(deadline=None, max_examples=40)
@given(st.integers(40, 500), st.integers(40, 500), st.sampled_from([(32, 32), (32, 64), (64, 32), (48, 33)]))
def test_the_largest_centre_crop_is_resized(full_height: int, full_width: int, size: tuple[int, int]) -> None:
    height, width = size
    found = decode_picture(encode(smooth(full_height, full_width), "JPEG", quality=98), height, width)
    assert found.shape == (height, width, 3)
    scale = max(width / full_width, height / full_height)
    across, down = width / scale / full_width, height / scale / full_height  # the share of each side that is seen
    red = 255 * (0.5 + across * ((np.arange(width) + 0.5) / width - 0.5))
    green = 255 * (0.5 + down * ((np.arange(height) + 0.5) / height - 0.5))
    inside = slice(2, -2)  # the filter has no neighbours beyond the edge
    assert np.abs(found[height // 2, inside, 0] - red[inside]).max() < 7
    assert np.abs(found[inside, width // 2, 1] - green[inside]).max() < 7


def test_it_is_close_to_decoding_whole() -> None:
    """Against Pillow's Lanczos of the whole picture: the same picture, but for the filter."""
    draws = np.random.default_rng(0)
    rough = Image.fromarray(draws.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    whole = rough.resize((1500, 1000), Image.Resampling.BICUBIC)
    data = encode(np.asarray(whole), "JPEG", quality=95)
    ours = decode_picture(data, 128, 128).astype(np.float64)
    crop = whole.resize((128, 128), Image.Resampling.LANCZOS, box=(250, 0, 1250, 1000))
    assert np.sqrt(((ours - np.asarray(crop)) ** 2).mean()) < 4  # of 255


def test_the_bits_are_what_they_were() -> None:
    """`data.decoder` names them. Where libjpeg or Pillow changes them, the name must change, too."""
    found = decode_picture(encode(smooth(90, 120), "JPEG", quality=90), 16, 16)
    assert found[::5, ::5, 0].tolist() == [
        [35, 97, 158, 219],
        [36, 97, 158, 219],
        [35, 96, 158, 219],
        [36, 97, 158, 219],
    ]


def test_pictures_of_the_right_size_are_left_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_picture(encode(pixels, "PNG"), 16, 24), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_other_formats_and_grey(kind: str) -> None:
    found = decode_picture(encode(smooth(100, 100)[..., 0], kind), 20, 20)
    assert found.shape == (20, 20, 3)
    np.testing.assert_array_equal(found[..., 0], found[..., 1])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_pictures(kind: str) -> None:
    data = encode(smooth(200, 200), kind)
    for broken in (b"", b"no picture", data[: len(data) // 2], data[:60]):
        with pytest.raises(DecodeError, match="not a picture"):
            decode_picture(broken, 32, 32)


FACTS = LatentFacts(
    encoder="", weights_sha256="", channels=4, downsampling=8, moments=False, scaling_factor=1, shift_factor=0
)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_bfloat16_latents() -> None:
    values = np.array([1.0, -2.5, 3e38, 1e-30, 0.0], dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored = np.broadcast_to(bits, (4, 1, 5)).copy()
    latent, std = decode_latent(npy(stored), FACTS.model_copy(update={"dtype": "bfloat16"}))
    assert std is None
    np.testing.assert_array_equal(latent[2, 0], (bits.astype(np.uint32) << 16).view(np.float32))


def test_int8_text() -> None:
    facts = TextFacts(encoder="", weights_sha256="", dim=3, pooled_dim=0, max_tokens=4, dtype="int8")
    tokens = np.array([[127, -64, 0], [1, 2, 3]], dtype=np.int8)
    scales = np.array([0.5, 2.0], dtype=np.float16)
    text = decode_text({"text.npy": npy(tokens), "text_scale.npy": npy(scales)}, facts)
    assert text.tokens.tolist() == [[63.5, -32.0, 0.0], [2.0, 4.0, 6.0]]
    assert text.pooled.shape == (0,)


def test_broken_arrays() -> None:
    whole = npy(np.zeros((4, 2, 2), np.float16))
    for broken in (b"", whole[:8], whole[:-1], b"x" + whole[1:], whole + b"1", npy(np.asfortranarray(np.eye(3)[:2]))):
        with pytest.raises(DecodeError, match="not an array"):
            decode_array(broken)
    with pytest.raises(DecodeError, match=r"a latent of shape \[3, 2, 2\], not of 4 channels"):
        decode_latent(npy(np.zeros((3, 2, 2), np.float16)), FACTS)
