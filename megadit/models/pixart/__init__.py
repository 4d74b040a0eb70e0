"""PixArt-alpha (arXiv 2310.00426): text by cross-attention, and one modulation for all blocks."""

from megadit.models.diffusers_format import DiffusersFormat
from megadit.models.family import Family
from megadit.models.pixart.config import PRESETS, PixArtConfig
from megadit.models.pixart.initialisation import RULES
from megadit.models.pixart.model import PixArt, forward_flops

__all__ = ["PIXART", "PixArt", "PixArtConfig"]


def _diffusers() -> DiffusersFormat:
    from megadit.models.pixart.diffusers import FORMAT

    return FORMAT


PIXART = Family(
    config=PixArtConfig,
    build=PixArt,
    forward_flops=forward_flops,
    initial=RULES,
    readout="final_layer.linear",
    tables=("scale_shift_table",),
    presets=PRESETS,
    kernels=("gelu_tanh",),
    has_published=True,
    diffusers=_diffusers,
)
