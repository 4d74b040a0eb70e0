"""One rank says what it is of all."""

from typing import Any

import torch

from megadit.distributed import process_group


def main(num_replicas: int) -> dict[str, Any]:
    with process_group(needed=True, num_replicas=num_replicas) as topology:
        mesh = topology.mesh
        return {
            "replicate": topology.replicate,
            "shard": topology.shard,
            "data": topology.data,
            "mesh": list(mesh.shape),
            "place in mesh": list(mesh.get_coordinate() or []),
            "sum": topology.sum(torch.tensor(topology.rank)).item(),
            "first": topology.on_first(lambda: topology.rank),
            "every": topology.on_every(lambda: topology.rank),
        }
