"""Engines: one model over ranks, behind the protocol of base.py."""

import os

import torch

from megadit.distributed import Topology
from megadit.engines.base import Engine
from megadit.recipe import Recipe


def build(recipe: Recipe, topology: Topology) -> Engine:
    """The engine that the recipe names, with initial weights. Needs a process group unless it is `single`.

    Sets how this process multiplies fp32 matrices on a GPU.
    """
    # The older of torch's two switches: once the newer is used, Dynamo's reading of this one is an error (torch 2.13).
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.training.precision == "tf32"
    if recipe.engine.kind.startswith("zero"):
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches at import, and warns
        from megadit.engines.zero import ZeroEngine  # DeepSpeed takes seconds to import

        return ZeroEngine(recipe, topology)
    from megadit.engines.fsdp import TorchEngine

    return TorchEngine(recipe, topology)
