"""MMDiT (Stable Diffusion 3, arXiv 2403.03206): image and text tokens that attend jointly."""

from megadit.models.diffusers_format import DiffusersFormat
from megadit.models.family import Family
from megadit.models.mmdit.config import PRESETS, MMDiTConfig, RepaHeadConfig
from megadit.models.mmdit.initialisation import RULES
from megadit.models.mmdit.model import MMDiT, forward_flops

__all__ = ["MMDIT", "MMDiT", "MMDiTConfig", "RepaHeadConfig"]


def _diffusers() -> DiffusersFormat:
    from megadit.models.mmdit.diffusers import FORMAT

    return FORMAT


MMDIT = Family(
    config=MMDiTConfig,
    build=MMDiT,
    forward_flops=forward_flops,
    initial=RULES,
    readout="readout",
    presets=PRESETS,
    kernels=("gelu_tanh", "joint_qkv"),
    diffusers=_diffusers,
)
