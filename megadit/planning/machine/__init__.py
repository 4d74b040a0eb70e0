"""Of what a plan is made: GPUs, how they are connected, and what nobody can know before a run."""
