"""Initial weights of a PixArt-alpha: the table of the official code of arXiv 2505.15270
(ML-GSAI/Scaling-Diffusion-Transformers-muP), PixArt-alpha/.../PixArt.py, with mup_init on and off.
"""

from collections.abc import Mapping

from megadit.models.rules import N_002, ROW, XAVIER, XAVIER_FLAT, ZERO, Rules, changed

_MUP: Rules = {
    "final_layer.linear.weight": ZERO,
    "x_embedder.proj.weight": XAVIER,
    "t_embedder.mlp.*.weight": N_002,
    "t_block.1.weight": N_002,
    "y_embedder.y_proj.*.weight": N_002,
    "*scale_shift_table": N_002,
    "blocks.*.cross_attn.proj.weight": ZERO,
    "blocks.*.weight": XAVIER,
    "*.bias": ZERO,
}
RULES: Mapping[str, Rules] = {
    "mup, paper": _MUP,
    "mup, zero": changed(_MUP, {"t_block.1.weight": ZERO, "*scale_shift_table": ZERO}),
    "sp": changed(_MUP, {"x_embedder.proj.weight": XAVIER_FLAT, "*scale_shift_table": ROW}),
}
