"""GPUs as data: what each has and can do at most, from data sheets; what it costs and reaches, as assumptions.

Peaks are dense: data sheets that state them "with sparsity" state twice as much.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """One GPU and its place in the usual machine."""

    device_name: str  # a part of what the driver calls it
    memory_gib: float  # that a process sees
    memory_gb_per_second: float  # 10^9 bytes
    tflops: Mapping[str, float]  # at most, by the precision of matrix products; sums are in fp32
    sustained_share: float  # of that, what large matrix products reach for minutes: clocks fall under load
    link_gb_per_second: float  # to the GPUs of its node, one direction
    gpus_per_node: int
    nic_gb_per_second: float  # to other nodes, one direction; each GPU has a NIC of its own
    dollars_per_hour: float  # an assumption: rented for months
    source: str


GPUS: Mapping[str, Gpu] = {
    "a100-40": Gpu(
        device_name="A100-SXM4-40GB",
        memory_gib=39.4,
        memory_gb_per_second=1555,
        tflops={"bf16": 312, "tf32": 156, "fp32": 19.5},
        sustained_share=0.85,
        link_gb_per_second=300,
        gpus_per_node=8,
        nic_gb_per_second=25,
        dollars_per_hour=1.3,
        source="NVIDIA A100 data sheet; DGX A100: 8 NICs of 200 Gb/s",
    ),
    "a100": Gpu(
        device_name="A100",
        memory_gib=79.1,
        memory_gb_per_second=2039,
        tflops={"bf16": 312, "tf32": 156, "fp32": 19.5},
        sustained_share=0.85,
        link_gb_per_second=300,
        gpus_per_node=8,
        nic_gb_per_second=25,
        dollars_per_hour=1.8,
        source="NVIDIA A100 80GB SXM data sheet; DGX A100: 8 NICs of 200 Gb/s",
    ),
    "h100": Gpu(
        device_name="H100",
        memory_gib=79.1,
        memory_gb_per_second=3350,
        tflops={"bf16": 989, "tf32": 494, "fp32": 67},
        sustained_share=0.70,
        link_gb_per_second=450,
        gpus_per_node=8,
        nic_gb_per_second=50,
        dollars_per_hour=3.0,
        source="NVIDIA H100 SXM5 data sheet; DGX H100: 8 NICs of 400 Gb/s",
    ),
    "h200": Gpu(
        device_name="H200",
        memory_gib=139.8,
        memory_gb_per_second=4800,
        tflops={"bf16": 989, "tf32": 494, "fp32": 67},
        sustained_share=0.76,
        link_gb_per_second=450,
        gpus_per_node=8,
        nic_gb_per_second=50,
        dollars_per_hour=3.6,
        source="NVIDIA H200 data sheet; DGX H200: 8 NICs of 400 Gb/s",
    ),
    "gb200": Gpu(
        device_name="GB200",
        memory_gib=184.0,
        memory_gb_per_second=8000,
        tflops={"bf16": 2500, "tf32": 1250, "fp32": 80},
        sustained_share=0.70,
        link_gb_per_second=900,
        gpus_per_node=4,
        nic_gb_per_second=50,
        dollars_per_hour=7.0,
        source="NVIDIA GB200 NVL72 data sheet, a tray of 4 taken as a node (NVLink reaches all 72)",
    ),
    "b200": Gpu(
        device_name="B200",
        memory_gib=178.0,
        memory_gb_per_second=8000,
        tflops={"bf16": 2250, "tf32": 1125, "fp32": 75},
        sustained_share=0.70,
        link_gb_per_second=900,
        gpus_per_node=8,
        nic_gb_per_second=50,
        dollars_per_hour=5.5,
        source="NVIDIA DGX B200 data sheet: 1,440 GB, 64 TB/s and 18 PFLOP/s of dense bf16 for 8 GPUs",
    ),
    "mi300x": Gpu(
        device_name="MI300X",
        memory_gib=191.0,
        memory_gb_per_second=5300,
        tflops={"bf16": 1307, "tf32": 653, "fp32": 163},
        sustained_share=0.50,
        link_gb_per_second=448,
        gpus_per_node=8,
        nic_gb_per_second=50,
        dollars_per_hour=2.5,
        source="AMD Instinct MI300X data sheet: 7 Infinity Fabric links of 64 GB/s each way",
    ),
}


def gpu_called(name: str) -> Gpu:
    """The GPU of this name in the table. Raises ValueError that lists those there are."""
    if name not in GPUS:
        raise ValueError(f"GPU {name!r} is not in the table; there are {', '.join(GPUS)}")
    return GPUS[name]
