"""What a GPU can do at most, for the model FLOPs utilisation."""

import torch

# Dense TFLOP/s of matrix products by part of the device's name, the first match counts: (bf16 with fp32 sums, fp32
# without TF32). From NVIDIA's data sheets, where "with sparsity" is twice the dense number.
PEAK_TFLOPS = {
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "A100": (312.0, 19.5),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of one device at most for `precision` (fp32, bf16); None for one that is not in the table.

    A slice of a GPU (MIG) is not in the table.
    """
    if "MIG" in device_name:
        return None
    for part, (bf16, fp32) in PEAK_TFLOPS.items():
        if part in device_name:
            return 1e12 * (bf16 if precision == "bf16" else fp32)
    return None


def device_name(device: torch.device) -> str:
    """What the machine calls the device; `CPU` for all processors."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
