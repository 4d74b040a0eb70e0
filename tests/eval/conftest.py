"""What the tests of evaluation share: oracles, and a small folder of generated images."""

import hashlib
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TORCHVISION = {
    "torchvision": (),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "STL10"),
    "torchvision.transforms": ("Compose",),
    "torchvision.transforms.functional": (),
    "torchvision.models": (),
}


@pytest.fixture(scope="session")
def import_fidelity() -> Callable[[str], types.ModuleType]:
    """Import a module of torch-fidelity, which asks for torchvision in modules that are not used here."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity, installed with --no-deps (see requirements/tools.txt)")

    def import_module(name: str) -> types.ModuleType:
        if name in sys.modules:
            return sys.modules[name]
        assert "torchvision" not in sys.modules
        for module, names in TORCHVISION.items():
            sys.modules[module] = types.ModuleType(module)
            for member in names:
                setattr(sys.modules[module], member, object)
        for module in list(TORCHVISION)[1:]:
            parent, _, child = module.rpartition(".")
            setattr(sys.modules[parent], child, sys.modules[module])
        try:
            return importlib.import_module(name)
        finally:  # transformers must not find it
            for module in TORCHVISION:
                del sys.modules[module]

    return import_module


def pixels_of(seed: int, height: int = 24, width: int = 24) -> np.ndarray:
    """A picture of coloured blocks, uint8 [height, width, 3]: not noise, so that networks tell two apart."""
    blocks = np.random.default_rng(seed).integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


@pytest.fixture(scope="session")
def make_pixels() -> Callable[..., np.ndarray]:
    return pixels_of


@pytest.fixture
def generated(tmp_path: Path) -> Callable[..., Path]:
    """Write a finished folder of generated images, two for each prompt of four categories."""

    def write(num_prompts: int = 20, images_per_prompt: int = 2, seed: int = 0) -> Path:
        folder = tmp_path / f"generated-{num_prompts}-{seed}"
        units = []
        prompts = [
            {"index": index, "prompt": f"a picture of number {index}", "category": f"category-{index % 4}"}
            for index in range(num_prompts)
        ]
        for prompt in range(num_prompts):
            for image in range(images_per_prompt):
                path = folder / "images" / f"{prompt // 1000:06d}" / f"{prompt:06d}-{image:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels_of(seed * 100_000 + prompt * images_per_prompt + image)).save(path)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                units.append({"prompt": prompt, "image": image, "sha256": digest})
        manifest = {
            "task": {"id": "prompts", "version": 1},
            "num_units": len(units),
            "images_per_prompt": images_per_prompt,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
        (folder / "units").mkdir()
        (folder / "units" / "rank-0-of-1.jsonl").write_text("".join(f"{json.dumps(unit)}\n" for unit in units))
        return folder

    return write
