import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megadit.batch import Batch, concatenate
from megadit.data.format.manifest import Manifest
from megadit.data.loading.loader import Loader, validation_batches
from megadit.data.loading.order import Order
from megadit.data.packing.sources import open_source
from megadit.data.storage import open_store
from megadit.randomness import Purpose, generator
from megadit.recipe import Data

BATCH, SEED, K, C, G = 8, 11, 4, 3, 2
STEPS = 40  # more than two epochs


def settings(url: str | Path, **changes: object) -> Data:
    return Data(**({"url": str(url), "num_streams": K, "chunk_samples": C, "chunks_per_group": G} | changes))


def validation_settings(url: Path) -> Data:
    return Data(url="file:///nowhere", validation_url=str(url))


def steps(url: str | Path, ranks: int = 1, workers: int = 0, first: int = 0, count: int = STEPS) -> list[Batch]:
    """The global batches: those of all ranks, one after the other."""
    streams = [
        Loader(settings(url, num_workers=workers), SEED, BATCH, rank, ranks).iterate(first) for rank in range(ranks)
    ]
    batches = [concatenate([next(stream) for stream in streams]) for _ in range(count)]
    for stream in streams:
        stream.close()
    return batches


def digest(batches: list[Batch]) -> str:
    """Over every byte except the padding of the captions, which depends on who is in the same batch."""
    result = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.images, batch.pooled, batch.noise, batch.timestep_uniform, batch.drop_uniform):
            result.update(tensor.numpy().tobytes())
        for tensor in (batch.epoch, batch.sample, batch.text_lengths):
            result.update(tensor.numpy().tobytes())
        for text, length in zip(batch.text, batch.text_lengths, strict=True):
            assert not text[length:].any()
            result.update(text[:length].numpy().tobytes())
    return result.hexdigest()


@pytest.fixture(scope="module")
def train(packed: Path) -> Path:
    return packed / "train"


@pytest.fixture(scope="module")
def expected(train: Path) -> list[Batch]:
    return steps(train)


def test_the_samples_are_those_of_the_order(train: Path, expected: list[Batch]) -> None:
    order = Order(Manifest.load(str(train)).num_samples, SEED, K, C, G)
    for number, batch in enumerate(expected):
        pairs = torch.stack([batch.epoch, batch.sample], dim=1).numpy()
        np.testing.assert_array_equal(pairs, order.step(number, BATCH))
    assert int(expected[-1].epoch.max()) >= 2


def test_the_contents_are_those_of_the_shards(train: Path, expected: list[Batch]) -> None:
    contents: list[dict[str, bytes]] = []
    for shard in sorted(train.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                kind = member.name.partition(".")[2]
                if kind == "png":
                    contents.append({})
                file = tar.extractfile(member)
                assert file is not None
                contents[-1][kind] = file.read()
    batch = expected[7]
    for place, sample in enumerate(batch.sample.tolist()):
        pixels = np.asarray(Image.open(io.BytesIO(contents[sample]["png"])), dtype=np.float64)
        np.testing.assert_allclose(batch.images[place].permute(1, 2, 0), pixels / 127.5 - 1, atol=1e-6)
        text = np.load(io.BytesIO(contents[sample]["text.npy"]))
        length = int(batch.text_lengths[place])
        assert length == len(text)
        np.testing.assert_array_equal(batch.text[place, :length], text.astype(np.float32))
        np.testing.assert_array_equal(batch.pooled[place], np.load(io.BytesIO(contents[sample]["pooled.npy"])))


def test_the_draws_are_those_of_the_sample(expected: list[Batch]) -> None:
    batch = expected[20]
    for place, (epoch, sample) in enumerate(zip(batch.epoch.tolist(), batch.sample.tolist(), strict=True)):
        draws = generator(SEED, Purpose.TRAINING_SAMPLE, epoch, sample)
        uniforms = draws.random(2, dtype=np.float32)
        assert [batch.timestep_uniform[place], batch.drop_uniform[place]] == uniforms.tolist()
        np.testing.assert_array_equal(batch.noise[place], draws.standard_normal((3, 16, 16), dtype=np.float32))
    noise = torch.stack([batch.noise for batch in expected])
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    uniforms = torch.cat([batch.timestep_uniform for batch in expected])
    assert abs(float(uniforms.mean()) - 0.5) < 0.06


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks(train: Path, expected: list[Batch], ranks: int) -> None:
    assert digest(steps(train, ranks)) == digest(expected)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (2, 2), (4, 9)])
def test_any_number_of_workers(train: Path, expected: list[Batch], ranks: int, workers: int) -> None:
    state = torch.get_rng_state()
    assert digest(steps(train, ranks, workers)) == digest(expected)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the trainer's generator


@pytest.mark.parametrize(("first", "ranks"), [(1, 1), (17, 2), (33, 4)])
def test_resuming_equals_continuing(train: Path, expected: list[Batch], first: int, ranks: int) -> None:
    assert digest(steps(train, ranks, first=first, count=STEPS - first)) == digest(expected[first:])


def test_labels_come_with_their_pictures(
    pack_animals: Callable, expected: list[Batch], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("labelled")
    manifest = pack_animals(str(folder), label="subgroup").train
    keys = manifest.load_index(open_store(str(folder / "train"))).keys
    metadata = open_source("emoji").metadata
    batches = steps(folder / "train", ranks=2, workers=1)
    for batch in batches:
        assert batch.labels.dtype == torch.int64
        names = [metadata[keys[sample].decode()]["subgroup"] for sample in batch.sample.tolist()]
        assert [manifest.labels[number] for number in batch.labels.tolist()] == names
    assert digest(batches) == digest(expected)  # labels change nothing else
    for batch, _ in validation_batches(validation_settings(folder / "train"), SEED, 0, 1, 16, 2):
        names = [metadata[keys[sample].decode()]["subgroup"] for sample in batch.sample.tolist()]
        assert [manifest.labels[number] for number in batch.labels.tolist()] == names
    assert not torch.cat([batch.labels for batch in expected]).any()  # a pack without labels


def test_from_s3(packed: Path, expected: list[Batch], s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/copy")
    for path in filter(Path.is_file, (packed / "train").rglob("*")):
        store.put(str(path.relative_to(packed / "train")), path.read_bytes())
    assert digest(steps(f"{s3_bucket}/copy")) == digest(expected)
    assert digest(steps(f"{s3_bucket}/copy", workers=2)) == digest(expected)


def test_bytes_that_flip_on_the_way_are_read_again(train: Path, expected: list[Batch], tmp_path: Path, caplog) -> None:
    copy = Path(shutil.copytree(train, tmp_path / "copy"))
    shard = copy / "shard-000000.tar"
    good = shard.read_bytes()
    shard.write_bytes(bytes(byte ^ 1 for byte in good))

    lock = threading.Lock()

    class MendAfterTheFirstWarning:
        """The second read finds the good bytes."""

        def filter(self, record: object) -> bool:
            with lock:  # several threads read the shard
                (copy / "good").write_bytes(good)
                (copy / "good").replace(shard)
            return True

    caplog.handler.addFilter(MendAfterTheFirstWarning())
    assert digest(steps(copy, count=2)) == digest(expected[:2])
    assert "reading it again" in caplog.text


def test_errors(train: Path) -> None:
    with pytest.raises(ValueError, match=r"3 ranks do not divide data.num_streams 4"):
        Loader(settings(train), SEED, BATCH, 0, 3)
    with pytest.raises(ValueError, match=r"data.num_streams 4 must divide training.batch_size 6"):
        Loader(settings(train), SEED, 6, 0, 1)
    with pytest.raises(ValueError, match=r"samples are too few for data.num_streams 4 x"):
        Loader(settings(train, chunk_samples=100), SEED, BATCH, 0, 1)


def test_workers_stop_with_the_iterator(train: Path) -> None:
    stream = Loader(settings(train, num_workers=2), SEED, BATCH, 0, 1).iterate(0)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    stream.close()
    assert not any(worker.is_alive() for worker in workers)


LEFT_OPEN = """
import sys
from megadit.data.loading.loader import Loader
from megadit.recipe import Data
if __name__ == "__main__":
    data = Data(url=sys.argv[1], chunk_samples=3, chunks_per_group=2, num_workers=2)
    stream = Loader(data, 0, 8, 0, 1).iterate(0)
    next(stream)
    raise SystemExit(7)
"""


def test_a_trainer_that_leaves_the_iterator_open_ends(train: Path, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(LEFT_OPEN)
    assert subprocess.run([sys.executable, "-P", script, train], timeout=60, check=False).returncode == 7


KILLED_TRAINER = """
import multiprocessing, os, signal, sys
from megadit.data.loading.loader import Loader
from megadit.recipe import Data
if __name__ == "__main__":
    data = Data(url=sys.argv[1], chunk_samples=3, chunks_per_group=2, num_workers=2)
    stream = Loader(data, 0, 8, 0, 1).iterate(0)
    next(stream)
    workers = [worker.pid for worker in multiprocessing.active_children()]
    for worker in workers:
        os.kill(worker, signal.SIGINT)  # as a terminal does on Ctrl-C; ignored
    for _ in range(20):
        next(stream)
    print(*workers, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_trainer(train: Path, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(KILLED_TRAINER)
    trainer = subprocess.run([sys.executable, "-P", script, train], stdout=subprocess.PIPE, text=True, check=False)
    assert trainer.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in trainer.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers outlive the trainer"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 7), (2, 8), (3, 5), (4, 64)])
def test_validation_covers_every_pair_once(packed: Path, ranks: int, batch_size: int) -> None:
    data, timesteps = validation_settings(packed / "validation"), 4
    found: dict[tuple[int, float], tuple] = {}
    num_batches = set()
    for rank in range(ranks):
        batches = list(validation_batches(data, SEED, rank, ranks, batch_size, timesteps))
        num_batches.add(len(batches))
        for batch, weights in batches:
            assert len(batch) == len(weights) == batch_size
            assert (batch.drop_uniform == 1).all()
            for place in range(batch_size):
                pair = (int(batch.sample[place]), float(batch.timestep_uniform[place]))
                if weights[place]:
                    assert pair not in found
                    found[pair] = (batch.noise[place], batch.images[place])
    assert len(num_batches) == 1
    count = Manifest.load(str(packed / "validation")).num_samples
    assert set(found) == {(sample, (k + 0.5) / timesteps) for sample in range(count) for k in range(timesteps)}
    noise, _ = found[(3, 0.625)]
    draws = generator(SEED, Purpose.VALIDATION_SAMPLE, 3, 2)
    np.testing.assert_array_equal(noise, draws.standard_normal((3, 16, 16), dtype=np.float32))


def test_validation_takes_a_number_of_batches(packed: Path) -> None:
    batches = validation_batches(validation_settings(packed / "validation"), SEED, 0, 1, 5, 8)
    assert [int(batch.sample[0]) for batch, _ in islice(batches, 3)] == [0, 0, 1]
