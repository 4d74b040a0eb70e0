"""Initial weights of a DiT: the tables of the official code of arXiv 2505.15270
(ML-GSAI/Scaling-Diffusion-Transformers-muP), DiT/models_mup.py and DiT/models.py.
"""

from collections.abc import Mapping

from megadit.models.rules import FAN_IN, N_002, N_1, XAVIER, XAVIER_FLAT, ZERO, Rules, changed

_MUP: Rules = {
    "final_layer.linear.weight": ZERO,
    "y_embedder.embedding_table.weight": N_1,
    "*.weight": FAN_IN,
    "*.bias": ZERO,
}
RULES: Mapping[str, Rules] = {
    "mup, paper": _MUP,
    "mup, zero": changed(_MUP, {"*.adaLN_modulation.1.weight": ZERO, "y_embedder.embedding_table.weight": N_002}),
    "sp": {
        "final_layer.linear.weight": ZERO,
        "*.adaLN_modulation.1.weight": ZERO,
        "x_embedder.proj.weight": XAVIER_FLAT,
        "t_embedder.mlp.*.weight": N_002,
        "y_embedder.embedding_table.weight": N_002,
        "*.weight": XAVIER,
        "*.bias": ZERO,
    },
}
