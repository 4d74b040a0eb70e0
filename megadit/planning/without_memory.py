"""Running PyTorch code on tensors without memory, and writing down what it sends, multiplies and holds."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from megadit.planning.collectives import Axis, Calls, Kind

aten = torch.ops.aten
KINDS: Mapping[str, Kind] = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class Recorder(TorchDispatchMode):
    """While it is entered, new tensors have no memory, and `calls`, `flops` and `peak_bytes` grow.

    Tensors of the meta device and those that were made before stay what they are. What the host reads from a tensor
    without memory (is this norm finite, is a label out of range) is 0, or no.

    Bytes are those of storages, from their first use to their end: not what a kernel takes for itself meanwhile, nor
    what an allocator rounds up. FLOPs are by torch's own formulas, but for the backward pass of attention: twice the
    forward pass, see flops.py.
    """

    def __init__(self, axis_of: Callable[[Kind, str], Axis]) -> None:
        """`axis_of` says over which ranks a collective goes: from its kind and the name of its process group."""
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)  # such as the generators' and a mesh's
        self._axis_of = axis_of
        self._sizes: dict[int, tuple[Any, int]] = {}  # of a storage -> a reference that tells of its end, its bytes
        self.calls: Calls = Counter()
        self.flops = 0
        self.live_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # it comes again as what it does to its local part
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "c10d":
            self._count_call(func, args, tensors)
        if _has_its_own_memory(func, tensors, kwargs.get("device")):
            return func(*args, **kwargs)
        with self._fake:
            result = func(*args, **kwargs)
        if count := _FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._hold(leaf.untyped_storage())
        return result

    def __enter__(self) -> "Recorder":
        super().__enter__()
        self._resizing = _watch_resizing(self._hold)
        self._resizing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._resizing.__exit__(*error)
        super().__exit__(*error)

    def _count_call(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        name = func._overloadpacket.__name__
        assert name in KINDS, f"a collective that has no name here: {name}"
        axis = self._axis_of(KINDS[name], dist.ProcessGroup.unbox(group).group_name)
        self.calls[KINDS[name], axis, max(tensor.nbytes for tensor in tensors)] += 1

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new, or has another size than before."""
        key, size = storage._cdata, storage.nbytes()
        reference, before = self._sizes.get(key) or (weakref.ref(storage, lambda _: self._let_go(key)), 0)
        self._sizes[key] = (reference, size)
        self.live_bytes += size - before
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _let_go(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)[1]


def _has_its_own_memory(func: Any, tensors: list[Tensor], device: Any) -> bool:
    """Whether an operation is on real tensors and for them: those of the meta device, and what came from outside."""
    if any(isinstance(tensor, FakeTensor) for tensor in tensors) or func is aten.lift_fresh.default:
        return False
    return torch.device(device).type == "meta" if device is not None else bool(tensors)


@contextmanager
def _watch_resizing(notice: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call `notice` with each storage that is resized: so FSDP2 frees gathered weights, unseen by dispatch."""
    resize = torch.UntypedStorage.resize_

    def resize_and_notice(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        notice(storage)

    torch.UntypedStorage.resize_ = resize_and_notice  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _attention_forward(query, key, value)


_FLOPS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
