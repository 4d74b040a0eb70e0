"""The trainer, its checkpoints, metrics and signals."""
