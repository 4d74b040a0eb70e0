"""What the tests share: an S3 server, a small packed data set, a tiny recipe on it, and ranks to run it."""

import itertools
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import Dinov2Config, Dinov2Model, T5Config, T5EncoderModel, T5TokenizerFast

from megadit.data.encoders.text_encoder import TextEncoder
from megadit.data.format.manifest import parse_bucket
from megadit.data.packing.pack import Packed, pack
from megadit.data.packing.settings import PackSettings
from megadit.data.packing.sources import open_source
from megadit.data.storage.local_s3 import LocalS3
from megadit.recipe import Recipe, load

os.environ["OMP_NUM_THREADS"] = "1"  # of every process started from here: ranks that share cores slow each other down
torch.set_num_threads(1)

SELECTION = ("group=animals-nature", "skin_tone=false")
PACK_SETTINGS = {"size": 16, "shard_samples": 50, "holdout": 8, "where": SELECTION, "seed": 3}
WORKERS = Path(__file__).parent / "workers"
RANK_SECONDS = 120
_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A running S3 server; its `environment` is not set yet."""
    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new, empty bucket, with the environment set so that boto3 finds it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{next(_numbers)}"
    s3.create_bucket(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def encoder() -> TextEncoder:
    return TextEncoder.load("minilm")


@pytest.fixture(scope="session")
def pack_animals(encoder: TextEncoder) -> Callable:
    """Pack the shipped animals to an address."""

    def pack_to(destination: str, on_progress: Callable = lambda done, total: None, **changes: Any) -> Packed | None:
        settings = PackSettings(**(PACK_SETTINGS | changes))
        return pack(open_source("emoji"), destination, settings, encoder, bars=lambda _: nullcontext(on_progress))

    return pack_to


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real AutoencoderKL with random weights, which halves each side into four channels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    folder = tmp_path_factory.mktemp("encoders") / "vae"
    AutoencoderKL(**blocks, **sizes, scaling_factor=0.18215, shift_factor=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real T5EncoderModel with random weights, 16 wide, and a T5Tokenizer that spells words."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "t5"
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in ("a", "of", "the", "in"))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.:-"]
    T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0).save_pretrained(folder)
    config = T5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed(pack_animals: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed data set of a few shards; tests that change it make a copy."""
    folder = tmp_path_factory.mktemp("packed")
    pack_animals(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_yaml(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file on the packed data: 20 steps of a model that takes milliseconds."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(f"""\
name: tiny
model:
  {{family: mmdit, input_size: 16, in_channels: 3, patch_size: 4, width: 64, depth: 2, head_dim: 16,
    text_dim: 384, pooled_dim: 384}}
parametrization: {{kind: mup, base_width: 32}}
objective: {{kind: flow, condition_dropout: 0.25}}
data: {{url: "file://{packed}/train", validation_url: "file://{packed}/validation", num_streams: 4}}
optimizer: {{lr: 2^-7, warmup_steps: 4, schedule: cosine, weight_decay: 0.01}}
training: {{num_images: 320, batch_size: 16, ema_rates: [0.9], log_every_steps: 1}}
checkpoints: {{every_images: 80, keep: 4}}
validation: {{every_images: 320, num_timesteps: 2}}
""")
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tiny_yaml: Path) -> Callable[..., Recipe]:
    """The tiny recipe with overrides."""
    return lambda *overrides: load(tiny_yaml, overrides)


@pytest.fixture(scope="session")
def repa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny DINOv2 with random weights, of 24 features."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "dinov2"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes, initializer_range=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def repa(repa_folder: Path) -> list[str]:
    """Overrides of the tiny recipe: REPA against that, with weight 0.25."""
    return [f"objective.repa={{encoder: {repa_folder}, weight: 0.25}}", "model.repa={block: 1, feature_dim: 24}"]


@pytest.fixture(scope="session")
def twin(pack_animals: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """A shipped recipe of CPU size (`dit-xl2-mup-cpu`, ...) on the packed animals, with overrides."""
    folder = tmp_path_factory.mktemp("labelled")
    manifest = pack_animals(str(folder), label="subgroup").train
    data = [f"data.url={folder}/train", f"data.validation_url={folder}/validation"]
    data += ["data.chunk_samples=8", "data.chunks_per_group=2"]
    sizes = [f"model.input_size={parse_bucket(manifest.buckets()[0])[0]}", "model.patch_size=4"]

    def make(name: str, *overrides: str) -> Recipe:
        classes = [f"model.num_classes={len(manifest.labels)}"] if name.startswith("dit") else []
        return load(name, [*data, *sizes, *classes, *overrides])

    return make


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Call `main(**arguments)` of tests/workers/SCRIPT on each of `num_ranks` new processes: their results, by rank.

    What runs for longer than `limit_seconds` is killed. Raises an ExceptionGroup of what was raised on the ranks.
    """
    context = multiprocessing.get_context("forkserver")
    engines = ["megadit.engines.fsdp", "megadit.engines.zero"]
    context.set_forkserver_preload(["megadit.training.trainer", *engines, "torch._dynamo"])  # as optimizers import it

    def run(script: str, num_ranks: int, *, limit_seconds: float = RANK_SECONDS, **arguments: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        task = {"script": WORKERS / script, "arguments": arguments, "folder": folder}
        ranks = [
            context.Process(
                target=runpy.run_path,
                args=(str(WORKERS / "rank.py"), task | {"rank": rank, "world_size": num_ranks, "port": port}),
            )
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + limit_seconds
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        return _results(folder, num_ranks)

    return run


def _results(folder: Path, num_ranks: int) -> list[Any]:
    for rank in range(num_ranks):
        sys.stdout.write((folder / f"{rank}.log").read_text())  # pytest shows it when the test fails
    missing = [rank for rank in range(num_ranks) if not (folder / f"{rank}.pt").exists()]
    assert not missing, f"ranks {missing} ended without a result"
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]
    if errors := [result for result in results if isinstance(result, Exception)]:
        raise ExceptionGroup("ranks failed", errors)
    return results
