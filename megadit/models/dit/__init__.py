"""DiT (arXiv 2212.09748): a class-conditional transformer with adaptive layer norm."""

from megadit.models.diffusers_format import DiffusersFormat
from megadit.models.dit.config import PRESETS, DiTConfig
from megadit.models.dit.initialisation import RULES
from megadit.models.dit.model import DiT, forward_flops
from megadit.models.family import Family

__all__ = ["DIT", "DiT", "DiTConfig"]


def _diffusers() -> DiffusersFormat:
    from megadit.models.dit.diffusers import FORMAT

    return FORMAT


DIT = Family(
    config=DiTConfig,
    build=DiT,
    forward_flops=forward_flops,
    initial=RULES,
    readout="final_layer.linear",
    presets=PRESETS,
    kernels=("gelu_tanh",),
    has_published=True,
    diffusers=_diffusers,
)
