"""Counts what one rank's program does: bytes held, products' FLOPs, collectives, and where the host waits for a device.

A dispatch mode sees every operation that reaches PyTorch's dispatcher, on fake tensors as on real ones. Memory is that
of storages: counted when an operation returns a tensor whose storage is new, given back when the storage dies, rounded
up to 512 bytes as PyTorch's allocator rounds. What the allocator loses to fragmentation, the CUDA context and NCCL's
buffers is not seen. Of the host's memory what is pinned counts, which a GPU copies to and from while the host goes on.
"""

from __future__ import annotations

import gc
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ultrafuser_mega.reporting.rehearsal import Collective

aten = torch.ops.aten
_BY_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # of a PyTorch that has it
_GRANULE = 512  # bytes that PyTorch's CUDA allocator rounds up to
_READS_A_NUMBER = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
_DATA_DEPENDENT = (aten.nonzero.default, aten.masked_select.default, aten.index.Tensor, aten.index_put_.default)
_FAKE_WORK = torch._C._distributed_c10d.FakeWork
# Collectives without a meta kernel in torch 2.13, which fake tensors need.
_COALESCED = ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_", "allreduce_coalesced_")


@dataclass
class Memory:
    """Bytes alive, by the kind of what made them, and the most there were."""

    now: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)


@dataclass
class Pinned:
    """Bytes of the host's memory that are pinned, and the most there were."""

    now: int = 0
    peak: int = 0


class Meter(TorchDispatchMode):
    """See the module. Open it around what is to be measured.

    Args:
        device: "cpu" or "cuda": whose memory counts.
        groups: name of a process group, as PyTorch knows it -> what to call it.
    """

    def __init__(self, device: str, groups: dict[str, str]) -> None:
        super().__init__()
        self.device, self.groups = device, groups
        self.kind = "weights"
        self._reading: FrameType | None = None
        self._alive: dict[int, tuple[int, str]] = {}
        self._pinned: dict[int, int] = {}
        self.memory, self.pinned = Memory(), Pinned()
        self.clear()

    def clear(self) -> None:
        """Forget everything but what is alive."""
        gc.collect()  # else it hangs on when Python collects what cycles hold, and no two runs count alike
        self.memory = Memory(self.memory.now, sum(self.memory.now.values()), dict(self.memory.now))
        self.pinned = Pinned(self.pinned.now, self.pinned.now)
        self.flops: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._collectives: dict[tuple[str, str], list[int]] = {}

    @property
    def collectives(self) -> list[Collective]:
        """Those that ran, in the order of their first calls."""
        return [Collective(*key, *counted) for key, counted in self._collectives.items()]

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is allocated meanwhile is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def rename(self, kind: str, to: str) -> None:
        """What is alive of one kind is of another from now on."""
        self._alive = {key: (size, to if of == kind else of) for key, (size, of) in self._alive.items()}
        self.memory.now[to] += self.memory.now.pop(kind, 0)

    def shift(self, kind: str, to: str, size: int) -> None:
        """So many bytes of what is alive of one kind are of another in truth; none if ``size`` is negative."""
        size = max(0, min(size, self.memory.now[kind]))
        self.memory.now[kind] -= size
        self.memory.now[to] += size

    def pin(self, tensor: Tensor) -> None:
        """Take a fake tensor of the host for a pinned one."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._unpin, storage._cdata)
        self.pinned.now += storage.nbytes()
        self.pinned.peak = max(self.pinned.peak, self.pinned.now)

    def _unpin(self, key: int) -> None:
        self.pinned.now -= self._pinned.pop(key, 0)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def waited(self, why: str) -> None:
        """Note that the host waits for the device, by the line that makes it."""
        if (reading := _tolist()) is not None:  # a fake tensor reads number by number, a real one all at once
            if reading is self._reading:
                return
            self._reading = reading
        self.waits[f"{why} at {_where()}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        answer = self._host_reads(func, args, kwargs)
        if answer is not None:
            return answer[0]
        if func.namespace == "c10d":
            self._count_collective(func, args)
            if packet.__name__ in _COALESCED and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
                return _FAKE_WORK().boxed()
        out = func(*args, **kwargs)
        if func.namespace != "prim":  # a fake tensor asked for its device
            self.operations[str(packet)] += 1
        if flops := _flops(packet, args, kwargs, out):
            self.flops["attention" if "attention" in str(packet) or "attn" in str(packet) else "products"] += flops
        if not func.is_view:  # one of an unknown storage looks at what a backend keeps for a collective it lacks
            for leaf in tree_leaves(out):
                self._hold(leaf)
        return out

    # ---- memory
    def _hold(self, tensor: object) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // _GRANULE) * _GRANULE
        self._alive[key] = (size, self.kind)
        weakref.finalize(storage, self._release, key)
        memory = self.memory
        memory.now[self.kind] += size
        total = sum(memory.now.values())
        if total > memory.peak:
            memory.peak, memory.at_peak = total, dict(memory.now)

    def _release(self, key: int) -> None:
        size, kind = self._alive.pop(key, (0, self.kind))
        self.memory.now[kind] -= size

    # ---- the host and the device
    def _host_reads(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """Note what makes the host wait; (the answer,) where a fake tensor cannot give one."""
        if func in _READS_A_NUMBER:
            tensor = args[0]
            if self._on_device(tensor):
                self.waited("a number is read")
            if isinstance(tensor, FakeTensor):
                if func is not aten._local_scalar_dense.default or tensor.dtype == torch.bool:
                    return (True,)
                return (1.0 if tensor.dtype.is_floating_point else 1,)
        elif func in (aten._to_copy.default, aten.copy_.default):
            copied, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0])
            to = copied.device if copied is not None else torch.device(kwargs.get("device") or source.device)
            non_blocking = kwargs.get("non_blocking", args[2] if copied is not None and len(args) > 2 else False)
            if self.device == "cuda" and {source.device.type, to.type} == {"cpu", "cuda"}:
                if to.type == "cpu":
                    if copied is None or not (non_blocking and self._is_pinned(copied)):
                        self.waited("a tensor is copied to the host")
                elif not (non_blocking and self._is_pinned(source)):
                    self.waited("a tensor that is not pinned, or may block, is copied to the device")
        elif func is aten.index_put_.default and args[2].numel() == 1 and args[2].device.type == "cpu":
            pass  # of a mask and a number PyTorch makes a masked_fill
        elif func in _DATA_DEPENDENT and any(
            self._on_device(leaf) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args if func is aten.nonzero.default else args[1:])
            if isinstance(leaf, Tensor)
        ):
            self.waited("a shape depends on values")
        return None

    def _on_device(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cuda" == self.device

    def _count_collective(self, func: Any, args: Any) -> None:
        name = func._overloadpacket.__name__.rstrip("_")
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        for leaf in tree_leaves(args):
            if isinstance(leaf, torch.ScriptObject) and (group := _group_name(leaf)) is not None:
                entry = self._collectives.setdefault((self.groups.get(group, group), name), [0, 0])
                entry[0] += 1
                entry[1] += max(sizes, default=0)
                return


def _group_name(boxed: torch.ScriptObject) -> str | None:
    try:
        return str(dist.ProcessGroup.unbox(boxed).group_name)
    except RuntimeError:  # another object of the call: reduce operation, options
        return None


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of a product or an attention; 0 of anything else."""
    if packet in (aten.addmm, aten.addmm_):  # torch's formula does not know out= and out_dtype=
        return 2 * int(args[1].shape[0]) * int(args[1].shape[1]) * int(args[2].shape[1])
    if packet is _BY_ONEDNN:
        return 2 * int(args[0].numel()) * int(args[1].shape[0])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    formula: Callable[..., int] | None = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _tolist() -> FrameType | None:
    """The outermost tolist() of a fake tensor that is running."""
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        if frame.f_code is FakeTensor.tolist.__code__:
            found = frame
        frame = frame.f_back
    return found


def _where() -> str:
    """The innermost line of this package that is running, and of Megatron where that is deeper."""
    ours = deeper = ""
    for frame in traceback.extract_stack():
        if "/ultrafuser_mega/dry_run/" in frame.filename:
            continue
        if "/ultrafuser_mega/" in frame.filename:
            ours, deeper = f"{frame.filename.rpartition('/ultrafuser_mega/')[2]}:{frame.lineno}", ""
        elif "/megatron/" in frame.filename:
            deeper = f"megatron/{frame.filename.rpartition('/megatron/')[2]}:{frame.lineno}"
    return " > ".join(filter(None, (ours, deeper))) or "autograd"
