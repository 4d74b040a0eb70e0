"""Our kernels, each beside its definition in plain PyTorch, and the attention of every model."""


def in_use(family: str, device: str, compiled: bool) -> list[str]:
    """Names of our kernels that a model of `family` runs on a type of device ("cpu", "cuda").

    What torch.compile traces is the compiler's; a GPU has a GELU of PyTorch's that is as fast as ours.
    """
    names = []
    if device == "cpu" and not compiled:
        names.append("gelu_tanh")
    if family == "mmdit" and not compiled:
        names.append("joint_qkv")
    return names
