"""What a GPU can do at most, for the model FLOPs utilisation."""

from collections.abc import Mapping

import torch

from megadit.planning.machine.gpus import GPUS

# Dense TFLOP/s of matrix products by part of the device's name, the first match counts: of cards that no cluster has
# (NVIDIA's data sheet of the H100, where "with sparsity" is twice the dense number), and of the table.
PEAK_TFLOPS: Mapping[str, Mapping[str, float]] = {
    "H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0},
    "H100 NVL": {"bf16": 835.0, "tf32": 417.0, "fp32": 60.0},
    **{gpu.device_name: gpu.tflops for gpu in GPUS.values()},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of one device at most for `precision` (fp32, tf32, bf16); None for one that is not in the table.

    A slice of a GPU (MIG) is not in the table.
    """
    if "MIG" in device_name:
        return None
    for part, tflops in PEAK_TFLOPS.items():
        if part in device_name:
            return 1e12 * tflops[precision]
    return None


def device_name(device: torch.device) -> str:
    """What the machine calls the device; `CPU` for all processors."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
