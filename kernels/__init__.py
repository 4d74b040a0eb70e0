"""Kernels: attention, and what plain PyTorch does in more passes over memory than it needs."""
