"""Weights from and for other projects: published checkpoints, and folders that diffusers loads."""
