"""Initial weights of an MMDiT: those of DiT, since the code of arXiv 2505.15270 for MMDiT was not released."""

from collections.abc import Mapping

from megadit.models.rules import FAN_IN, ONE, XAVIER, ZERO, Rules, changed

_MUP: Rules = {
    "readout.weight": ZERO,
    "blocks.*.qk_norm.*": ONE,
    "*.weight": FAN_IN,
    "*.bias": ZERO,
}
RULES: Mapping[str, Rules] = {
    "mup, paper": _MUP,
    "mup, zero": changed(_MUP, {"*modulation.weight": ZERO}),
    "sp": changed(_MUP, {"readout.weight": ZERO, "*modulation.weight": ZERO, "*.weight": XAVIER}),
}
