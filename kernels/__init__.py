"""Our kernels, each beside its definition in plain PyTorch, and the attention of every model."""

from collections.abc import Iterable

CPU_ONLY = ("gelu_tanh",)  # a GPU has a GELU of PyTorch's that is as fast as ours


def in_use(called: Iterable[str], device: str, compiled: bool) -> list[str]:
    """Which of our kernels that a model calls run on a type of device ("cpu", "cuda").

    What torch.compile traces is the compiler's.
    """
    return [name for name in called if not compiled and (device == "cpu" or name not in CPU_ONLY)]
