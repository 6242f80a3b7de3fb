"""A job of any size in one process: collectives that return at once, tensors that hold nothing, no GPU.

fake collectives  PyTorch's FakeProcessGroup; objects are taken to be alike on all ranks
fake tensors      PyTorch's FakeTensorMode: shapes, types and devices
fake GPU          only where the device is CUDA: see fake_cuda.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ultrafuser_mega.dry_run.meter import Meter


@contextmanager
def joined_fake_job(ranks: int, rank: int) -> Iterator[None]:
    """Be rank ``rank`` of a job of ``ranks``, the others of which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    before, parallel_state._GLOBAL_MEMORY_BUFFER = parallel_state._GLOBAL_MEMORY_BUFFER, None  # scratch space of layers
    try:
        with objects_are_alike():
            yield
    finally:
        parallel_state._GLOBAL_MEMORY_BUFFER = before
        dist.destroy_process_group()


@contextmanager
def objects_are_alike() -> Iterator[None]:
    """Collectives of Python objects give every rank's as this rank's, and move nothing."""
    with patch.multiple(dist, all_gather_object=_all_alike, gather_object=_gathered_alike):
        yield


@contextmanager
def fake_tensors(meter: Meter, device: torch.device) -> Iterator[None]:
    """Inside, tensors hold nothing and ``meter`` counts."""
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_no_cuda_runtime(meter, device))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(meter)
        stack.enter_context(_HostSide(meter))
        yield


class _HostSide(TorchFunctionMode):
    """What the host asks of a fake tensor and PyTorch's dispatcher does not see."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args else None
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            self.meter.pin(pinned)
            return pinned
        if isinstance(tensor, FakeTensor):
            if func in (Tensor.tolist, Tensor.numpy):
                if tensor.is_cuda:
                    self.meter.waited("values are read")
                values = np.ones(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
                return values if func is Tensor.numpy else values.tolist()
            if func is Tensor.type and len(args) == 1 and not kwargs and tensor.is_cuda:
                # Megatron's optimizers compare these names; a fake calls itself torch.BFloat16Tensor.
                return f"torch.cuda.{func(tensor).rpartition('.')[2]}"
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_cuda_runtime(meter: Meter, device: torch.device) -> Iterator[None]:
    """What Megatron and this program ask of torch.cuda, which a build without CUDA refuses to say."""
    with patch.multiple(
        torch.cuda,
        current_device=lambda: device.index,
        synchronize=lambda *args: meter.waited("torch.cuda.synchronize"),
        max_memory_allocated=lambda *args: 0,
        empty_cache=lambda: None,
    ):
        yield


def _all_alike(objects: list[Any], mine: Any, group: Any = None) -> None:
    objects[:] = [mine] * len(objects)


def _gathered_alike(mine: Any, objects: list[Any] | None = None, dst: int | None = None, group: Any = None) -> None:
    if objects is not None:
        objects[:] = [mine] * len(objects)
