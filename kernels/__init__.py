"""Kernels that torch.compile cannot write as well; none yet."""
