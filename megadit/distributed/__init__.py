"""The ranks of a run: how they join, which axes they form, and the few things that they do together."""

from megadit.distributed.process_group import process_group
from megadit.distributed.topology import ALONE, Axis, Topology

__all__ = ["ALONE", "Axis", "Topology", "process_group"]
