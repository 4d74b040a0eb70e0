"""How long a collective takes: bytes over the slowest wire on its way, and a step for each rank of the ring.

T = S (N - 1) / (N B) + a (N - 1) for an all-gather or reduce-scatter of S bytes over N ranks, twice that for an
all-reduce. Ranks are numbered node by node, and those of a replica are neighbours. So the ring over a replica of
several nodes uses all of a node's NICs at once, and the one over replicas the NIC of one GPU, or more
where a node has several replicas.
"""

from dataclasses import dataclass

from megadit.planning.collectives import Collective
from megadit.planning.machine.assumptions import Assumptions
from megadit.planning.machine.gpus import GB, Gpu


@dataclass(frozen=True)
class Network:
    """GPUs in nodes, and how they are divided into replicas."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    num_replicas: int
    assumed: Assumptions

    def seconds(self, collective: Collective) -> float:
        """Of all its calls, one after the other."""
        size = self._size(collective.axis)
        if size == 1:
            return 0.0
        passes = 2 if collective.kind == "all_reduce" else 1
        bandwidth = GB * self.gb_per_second(collective.axis)
        per_call = collective.num_bytes / collective.num_calls * (size - 1) / size / bandwidth
        latency = 1e-6 * self.assumed.latency_us * (size - 1)
        return passes * collective.num_calls * (per_call + latency)

    def gb_per_second(self, axis: str) -> float:
        """What a rank's ring along an axis reaches."""
        num_shards = self.num_gpus // self.num_replicas
        link = self.assumed.link_share * self.gpu.link_gb_per_second
        if self.num_gpus <= self.gpus_per_node or (axis == "shard" and num_shards <= self.gpus_per_node):
            return link
        rings = min(num_shards, self.gpus_per_node) if axis == "replicate" else 1  # that share the NICs of a node
        return min(link, self.assumed.nic_share * self.gpu.nic_gb_per_second * self.gpus_per_node / rings)

    def _size(self, axis: str) -> int:
        sizes = {"shard": self.num_gpus // self.num_replicas, "replicate": self.num_replicas, "all": self.num_gpus}
        return sizes[axis]
