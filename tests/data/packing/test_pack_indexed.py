"""SA-1B-shaped tars on their way into a packed data set: buckets, latents, text features, ranks, kills, faults."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from PIL import Image, ImageOps

from megadit.data import sa1b_like
from megadit.data.encoders.autoencoder import Autoencoder
from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.format.buckets import assign, bucket_table
from megadit.data.format.manifest import Manifest
from megadit.data.indexing.captions import CaptionTable
from megadit.data.indexing.dataset import index
from megadit.data.loading.chunks import ChunkReader
from megadit.data.packing.arrays import to_bfloat16_bits, to_float16, to_int8
from megadit.data.packing.pack import Packed, pack
from megadit.data.packing.pixels import fit
from megadit.data.packing.settings import PackError, PackSettings
from megadit.data.packing.sources import open_source
from megadit.data.storage import ChangedError, StorageError, open_store
from megadit.randomness import Purpose, generator

SQUARE = PackSettings(size=16, shard_samples=4, holdout=6)
BUCKETS = replace(SQUARE, size=64, aspect_buckets=True)


def make_sa1b(folder: Path, captioned: bool = True) -> Path:
    """An indexed data set of SA-1B-shaped tars, which lie beside it in `tars`."""
    sa1b_like.make(str(folder / "tars"), 24, samples_per_tar=8, short_side=96, num_masks=2)
    captions = CaptionTable(str(folder / "tars" / "captions.jsonl")) if captioned else None
    index(str(folder / "tars"), str(folder / "indexed"), captions=captions, workers=1)
    return folder / "indexed"


@pytest.fixture(scope="module")
def sa1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sa1b(tmp_path_factory.mktemp("sa1b"))


@pytest.fixture(scope="module")
def uncaptioned_sa1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sa1b(tmp_path_factory.mktemp("sa1b"), captioned=False)


@pytest.fixture
def copied_sa1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that a test may change."""
    return make_sa1b(tmp_path_factory.mktemp("sa1b"))


@pytest.fixture
def broken_sa1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a picture that was cut short before it was indexed."""
    folder = tmp_path_factory.mktemp("sa1b")
    make_sa1b(folder)
    path = folder / "tars" / "sa_000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            member.size = len(data) // 2 if member.name == "./sa_3.jpg" else len(data)
            tar.addfile(member, io.BytesIO(data[: member.size]))
    captions = CaptionTable(str(folder / "tars" / "captions.jsonl"))
    index(str(folder / "tars"), str(folder / "indexed"), captions=captions, workers=1)
    return folder / "indexed"


@pytest.fixture(scope="module")
def autoencoder(vae_folder: Path) -> Autoencoder:
    return Autoencoder.load(str(vae_folder))


@pytest.fixture(scope="module")
def t5(t5_folder: Path) -> TextEncoder:
    return TextEncoder.load(str(t5_folder), max_tokens=60)


def files(folder: Path) -> dict[str, bytes]:
    """All but what a killed process was just writing."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def samples(url: Path, decode: str | None = None) -> list[dict[str, Any]]:
    """As plain webdataset reads them."""
    dataset = webdataset.WebDataset(sorted(str(path) for path in url.glob("*.tar")), shardshuffle=False)
    return list(dataset.decode(decode) if decode else dataset.decode())


def original(sa1b: Path, key: str) -> Image.Image:
    for path in sa1b.parent.glob("tars/*.tar"):
        with tarfile.open(path) as tar:
            if f"./{key}.jpg" in tar.getnames():
                member = tar.extractfile(f"./{key}.jpg")
                assert member is not None
                return Image.open(io.BytesIO(member.read())).convert("RGB")
    raise AssertionError(key)


def test_pictures_of_their_own_sizes_become_squares(sa1b: Path, tmp_path: Path) -> None:
    packed = pack(open_source(str(sa1b)), str(tmp_path), SQUARE)
    assert packed
    assert packed.validation
    source = Manifest.load(str(sa1b))
    assert packed.train.num_samples + packed.validation.num_samples == source.num_samples
    assert packed.train.members == ("png", "txt")
    assert packed.train.text is packed.train.latent is None
    captions = {}
    for line in (sa1b.parent / "tars" / "captions.jsonl").read_text().splitlines():
        captions |= {json.loads(line)["key"]: json.loads(line)["caption"]}
    found = samples(tmp_path / "train", "pil") + samples(tmp_path / "validation", "pil")
    assert len({sample["__key__"] for sample in found}) == source.num_samples
    for sample in found:
        assert sample["txt"] == captions[sample["__key__"]]
        exact = ImageOps.fit(original(sa1b, sample["__key__"]), (16, 16), Image.Resampling.LANCZOS)
        assert sample["png"].size == (16, 16)
        assert rms(sample["png"], exact) < 8  # grain at a sixth of its size; see the next test


def test_a_smaller_scale_of_a_jpeg_makes_little_difference() -> None:
    """To decode at half the size first is three times as fast for SA-1B's pictures at 256 pixels."""
    data = (Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").read_bytes()
    exact = ImageOps.fit(Image.open(io.BytesIO(data)), (96, 112), Image.Resampling.LANCZOS)
    assert 0 < rms(fit(data, (112, 96), "x"), exact) < 1


def rms(one: Image.Image, other: Image.Image) -> float:
    """The root of the mean squared difference, of 255."""
    return float(np.sqrt(np.mean(np.square(np.asarray(one, float) - np.asarray(other, float)))))


def test_the_order_is_that_of_the_tars(sa1b: Path, tmp_path: Path) -> None:
    packed = pack(open_source(str(sa1b)), str(tmp_path), SQUARE)
    assert packed
    columns = packed.train.load_index(open_store(str(tmp_path / "train")))
    source = Manifest.load(str(sa1b)).load_index(open_store(str(sa1b)))
    kept = [key for key in source.keys.tolist() if key in set(columns.keys.tolist())]
    assert columns.keys.tolist() == kept


def test_aspect_ratio_buckets(sa1b: Path, tmp_path: Path) -> None:
    packed = pack(open_source(str(sa1b)), str(tmp_path), BUCKETS)
    assert packed
    table, source = bucket_table(64), Manifest.load(str(sa1b))
    columns = source.load_index(open_store(str(sa1b)))
    assert columns.sizes is not None
    wanted = dict(zip(columns.keys.tolist(), assign(columns.sizes, table), strict=True))
    keys, first = packed.train.load_index(open_store(str(tmp_path / "train"))).keys, 0
    assert len(packed.train.buckets()) > 2
    for shard in packed.train.shards:
        for key in keys[first : first + shard.num_samples].tolist():
            height, width = table[wanted[key]]
            assert shard.bucket == f"{height}x{width}"
        first += shard.num_samples
        with tarfile.open(tmp_path / "train" / shard.name) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    content = tar.extractfile(member)
                    assert content is not None
                    assert Image.open(io.BytesIO(content.read())).size == (width, height)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_those_of_the_packed_pictures(
    dtype: Any, sa1b: Path, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    packed = pack(open_source(str(sa1b)), str(tmp_path), replace(SQUARE, latent_dtype=dtype), None, autoencoder)
    assert packed
    assert packed.train.latent
    assert packed.train.latent.model_dump() == {
        "encoder": autoencoder.name,
        "weights_sha256": autoencoder.weights_sha256,
        "channels": 4,
        "downsampling": 2,
        "moments": True,
        "scaling_factor": 0.18215,
        "shift_factor": 0.1,
        "dtype": dtype,
    }
    for sample in samples(tmp_path / "train", "pil"):
        stored = sample["latent.npy"]
        assert stored.dtype == (np.float16 if dtype == "float16" else np.uint16)
        values = torch.from_numpy(stored.view(np.float16 if dtype == "float16" else np.int16))
        values = values.float() if dtype == "float16" else values.view(torch.bfloat16).float()
        pixels = torch.from_numpy(np.array(sample["png"])).permute(2, 0, 1)[None] / 127.5 - 1
        expected = torch.cat(autoencoder.encode(pixels))
        torch.testing.assert_close(values, expected, rtol=2**-8 if dtype == "bfloat16" else 2**-10, atol=1e-4)


def test_sampled_latents_depend_on_seed_and_sample_alone(sa1b: Path, autoencoder: Autoencoder, tmp_path: Path) -> None:
    source, drawn = open_source(str(sa1b)), {}
    for name, settings in {
        "one": replace(SQUARE, latents="sample"),
        "two": replace(SQUARE, latents="sample", shard_samples=3, keep_pictures=False),
        "other": replace(SQUARE, latents="sample", seed=1),
    }.items():
        assert pack(source, str(tmp_path / name), settings, None, autoencoder)
        drawn[name] = {sample["__key__"]: sample["latent.npy"] for sample in samples(tmp_path / name / "train")}
    number = next(number for number in range(24) if source.key(number) in drawn["one"])
    key = source.key(number)
    mean, std = autoencoder.encode(_pixels(tmp_path / "one", key))
    draw = generator(0, Purpose.PACKED_LATENT, number).standard_normal(mean.shape[1:], np.float32)
    np.testing.assert_allclose(drawn["one"][key], mean[0].numpy() + std[0].numpy() * draw, atol=4e-3)
    for key in drawn["one"]:
        np.testing.assert_allclose(drawn["one"][key], drawn["two"][key], atol=4e-3)
        assert np.abs(drawn["one"][key] - drawn["other"][key]).max() > 0.1
    assert "png" not in samples(tmp_path / "two" / "train")[0]


def _pixels(folder: Path, key: str) -> torch.Tensor:
    (sample,) = [sample for sample in samples(folder / "train", "pil") if sample["__key__"] == key]
    return torch.from_numpy(np.array(sample["png"])).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_text_features_are_cut_to_the_captions_length(dtype: Any, sa1b: Path, t5: TextEncoder, tmp_path: Path) -> None:
    packed = pack(open_source(str(sa1b)), str(tmp_path), replace(SQUARE, text_dtype=dtype), t5)
    assert packed
    assert packed.train.text
    assert (packed.train.text.max_tokens, packed.train.text.dim, packed.train.text.dtype) == (60, 16, dtype)
    lengths = set()
    for sample in samples(tmp_path / "train"):
        (expected,) = t5.encode([sample["txt"]])
        tokens = sample["text.npy"].astype(np.float32)
        if dtype == "int8":
            tokens *= sample["text_scale.npy"].astype(np.float32)[:, None]
            bound = np.abs(expected.tokens.numpy()).max(axis=1, keepdims=True) / 127 / 2 * 1.01
        else:
            bound = np.full((len(tokens), 1), 2e-3)
        assert (np.abs(tokens - expected.tokens.numpy()) <= bound + 1e-5).all()
        np.testing.assert_allclose(sample["pooled.npy"], expected.pooled, atol=1e-3)
        lengths.add(len(tokens))
    assert max(lengths) <= 60
    assert len(lengths) > 1


@given(st.integers(1, 5), st.integers(1, 9), st.floats(-30, 10), st.integers(0, 2**32 - 1))
def test_int8_is_off_by_half_a_scale_at_most(length: int, dim: int, log2_size: float, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((length, dim), np.float32)) * 2**log2_size
    values[0] = 0
    quantised, scales = to_int8(values, "x")
    assert quantised.dtype == np.int8
    assert scales.dtype == np.float16
    restored = quantised.astype(np.float64) * scales.astype(np.float64)[:, None]
    assert (np.abs(restored - values.numpy()) <= 0.5001 * scales.astype(np.float64)[:, None]).all()
    # and a scale is no larger than it must be, but for the spacing of float16
    largest = values.abs().max(dim=1).values.numpy() / 127
    assert (scales <= largest * (1 + 2**-9) + 2**-24).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the latents of 'x' do not fit into float16"):
        to_float16(torch.tensor([7e4]), "the latents of 'x'")
    with pytest.raises(ValueError, match="not finite"):
        to_bfloat16_bits(torch.tensor([torch.nan]), "the latents")
    with pytest.raises(ValueError, match="do not fit into int8"):
        to_int8(torch.tensor([[1e8]]), "the text features")


# Ranks and kills


@pytest.fixture(scope="module")
def whole(sa1b: Path, t5: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pack that one rank made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert pack(open_source(str(sa1b)), str(folder), BUCKETS, t5)
    return files(folder)


@hypothesis_settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world_size=st.integers(1, 5), turns=st.permutations(range(5)))
def test_the_bytes_do_not_depend_on_the_ranks(
    world_size: int, turns: list[int], sa1b: Path, t5: TextEncoder, whole: dict, tmp_path_factory: Any
) -> None:
    folder, source = tmp_path_factory.mktemp("ranks"), open_source(str(sa1b))
    outcomes = [
        pack(source, str(folder), BUCKETS, t5, rank=rank, world_size=world_size) for rank in turns if rank < world_size
    ]
    assert [outcome is None for outcome in outcomes] == [True] * (world_size - 1) + [False]  # the last one writes it
    assert files(folder) == whole


@pytest.mark.parametrize("num_kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_kills(
    num_kills: int, sa1b: Path, t5_folder: Path, whole: dict, run_ranks: Callable, tmp_path: Path
) -> None:
    arguments = {"source": str(sa1b), "t5": str(t5_folder), "settings": BUCKETS, "folder": tmp_path}
    (found,) = run_ranks("killed_pack.py", 1, num_kills=num_kills, **arguments)
    assert len(found) == num_kills
    assert len({operation.split()[0] for operation, _, _ in found}) > 1
    for operation, had_manifest, after in found:
        assert not had_manifest, operation
        assert after == whole, operation


def test_a_shard_that_is_there_is_not_made_again(sa1b: Path, t5: TextEncoder, whole: dict, tmp_path: Path) -> None:
    source = open_source(str(sa1b))
    pack(source, str(tmp_path), BUCKETS, t5, rank=0, world_size=2)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert made
    first, second = sorted(made)[:2]
    first.write_bytes(b"cut")
    second.with_name("shards").joinpath(second.stem + ".json").write_text('{"plan": ')
    assert pack(source, str(tmp_path), BUCKETS, t5)
    assert files(tmp_path) == whole
    for path, written in made.items():
        assert (path.stat().st_mtime_ns == written) == (path not in (first, second))


def test_jpeg_pictures(sa1b: Path, tmp_path: Path) -> None:
    packed = pack(open_source(str(sa1b)), str(tmp_path), replace(SQUARE, size=64, picture_format="jpg"))
    exact = pack(open_source(str(sa1b)), str(tmp_path / "png"), replace(SQUARE, size=64))
    assert packed
    assert exact
    assert packed.train.image
    assert packed.train.image.member == "jpg"
    for lossy, lossless in zip(
        samples(tmp_path / "train", "pil"), samples(tmp_path / "png" / "train", "pil"), strict=True
    ):
        assert 0 < rms(lossy["jpg"], lossless["png"]) < 3


def test_a_packed_data_set_is_a_source_too(sa1b: Path, autoencoder: Autoencoder, tmp_path: Path) -> None:
    """From pictures in buckets to latents in the same buckets."""
    first = pack(open_source(str(sa1b)), str(tmp_path / "pictures"), BUCKETS)
    second = pack(
        open_source(str(tmp_path / "pictures" / "train")),
        str(tmp_path / "latents"),
        replace(BUCKETS, keep_pictures=False, holdout=0),
        None,
        autoencoder,
    )
    assert first
    assert second
    assert second.validation is None
    assert not (tmp_path / "latents" / "validation").exists()
    assert second.train.num_samples == first.train.num_samples
    assert second.train.buckets() == first.train.buckets()


def test_the_stream_reads_what_was_packed(
    sa1b: Path, t5: TextEncoder, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    settings = replace(BUCKETS, keep_pictures=False, text_dtype="int8")
    packed = pack(open_source(str(sa1b)), str(tmp_path), settings, t5, autoencoder)
    assert packed
    reader, first = ChunkReader(str(tmp_path / "train")), 0
    for shard in packed.train.shards:
        height, width = (int(side) for side in str(shard.bucket).split("x"))
        for members in reader.read(range(first, first + shard.num_samples)).values():
            content = reader.decoder.decode(members, height, width)
            assert content.std is not None
            assert content.image.shape == content.std.shape == (4, height // 2, width // 2)
            assert content.text.tokens.shape[1] == 16
        first += shard.num_samples


# Bad input


def test_pictures_that_cannot_be_decoded(
    broken_sa1b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PackError, match=r"1 pictures cannot be decoded \(sa_3\); at most 0 may be left out \(0.1% of"):
        pack(open_source(str(broken_sa1b)), str(tmp_path), SQUARE)
    assert "the picture 'sa_3' cannot be decoded" in caplog.text
    monkeypatch.setattr("megadit.data.packing.pack.MAX_BROKEN_SHARE", 0.1)
    packed = pack(open_source(str(broken_sa1b)), str(tmp_path), SQUARE)
    assert packed
    assert packed.validation
    both = (packed.train, packed.validation)
    assert sum(manifest.num_samples for manifest in both) == Manifest.load(str(broken_sa1b)).num_samples - 1
    assert [manifest.left_out for manifest in both if manifest.left_out] == [{"picture cannot be decoded": 1}]
    assert Manifest.load(str(tmp_path / "train")) == packed.train


def test_a_source_that_changed_meanwhile(copied_sa1b: Path, tmp_path: Path) -> None:
    source = open_source(str(copied_sa1b))
    tar = copied_sa1b.parent / "tars" / "sa_000001.tar"
    os.utime(tar, ns=(1, 1))
    with pytest.raises(ChangedError, match=r"sa_000001.tar was changed since it was indexed"):
        pack(source, str(tmp_path), SQUARE)
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_bytes_that_are_not_those_that_were_indexed(copied_sa1b: Path, tmp_path: Path) -> None:
    tar = copied_sa1b.parent / "tars" / "sa_000001.tar"
    status, data = tar.stat(), bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StorageError, match=r"sa_000001.tar: member sa_\d+.jpg: CRC-32 differs, twice"):
        pack(open_source(str(copied_sa1b)), str(tmp_path), SQUARE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_pictures": False}, "without pictures there must be latents: give an autoencoder"),
        ({"where": ("a=b",)}, "a data set has no metadata to choose by"),
        ({"label": "a"}, "keeps the classes that it has; leave --label a out"),
        ({"size": 24, "aspect_buckets": True}, "must be a multiple of 16, not 24"),
        ({"holdout": 10**9}, "leave validation empty"),
    ],
)
def test_settings_that_make_no_pack(change: dict, message: str, sa1b: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pack(open_source(str(sa1b)), str(tmp_path), replace(SQUARE, **change))
    assert not files(tmp_path)


def test_what_the_encoders_do_not_take(
    sa1b: Path, uncaptioned_sa1b: Path, t5: TextEncoder, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    with pytest.raises(PackError, match=r"15x15 pixels are not a multiple of its downsampling 2"):
        pack(open_source(str(sa1b)), str(tmp_path), replace(SQUARE, size=15), None, autoencoder)
    with pytest.raises(PackError, match="has no captions to encode"):
        pack(open_source(str(uncaptioned_sa1b)), str(tmp_path), SQUARE, t5)
    assert not files(tmp_path)
    latents = pack(open_source(str(sa1b)), str(tmp_path), replace(SQUARE, keep_pictures=False), None, autoencoder)
    assert isinstance(latents, Packed)
    with pytest.raises(ValueError, match="has no pictures, only latents"):
        open_source(str(tmp_path / "train"))
