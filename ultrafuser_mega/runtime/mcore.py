"""Everything that knows about the Megatron-core version in use, and lets it run without CUDA.

Megatron-core 0.16 names CUDA unconditionally in its schedules, optimizers, gradient buffers and p2p code.
On a machine whose device is the CPU, :func:`megatron_scope` makes those names mean the CPU for as long as
it is open: same classes, same schedules, same collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode, _get_current_function_mode


@contextlib.contextmanager
def megatron_scope(device: torch.device) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Run Megatron-core code on ``device``; wrap model building, schedules and optimizer steps in it.

    Yields what to wrap the forward of layers and loss in, which name no CUDA by text: a look at every call of torch's
    would cost them a hundredth of a small model's step. Under a mode that someone has opened meanwhile they have it.

    Nothing in it draws random numbers: the specialists have no dropout, and their weights come from files. So Megatron
    keeps no states of generators here, on no device.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in (*_NO_RANDOM_STATES, *(() if device.type == "cuda" else _CUDA_IS_THE_CPU)):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # scratch space of the tensor-parallel layers
            parallel_state._set_global_memory_buffer()
        mode = None if device.type == "cuda" else stack.enter_context(_CudaNamesMeanCpu())

        @contextlib.contextmanager
        def names_as_they_are() -> Iterator[None]:
            on_top = mode if _get_current_function_mode() is mode else None  # torch takes off the one on top alone
            if on_top is not None:
                on_top.__exit__(None, None, None)
            try:
                yield
            finally:
                if on_top is not None:
                    on_top.__enter__()

        yield names_as_they_are


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Sends tensor factories and casts that name "cuda" to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")  # optimizers compare type names
        if kwargs and (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **(kwargs or {}))


class _NoRngTracker:
    """Megatron's tensor-parallel RNG forks without CUDA generators; no specialist has dropout."""

    def fork(self, name: str | None = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True

    def add(self, name: str, seed: int) -> None: ...

    def reset(self) -> None: ...

    def get_states(self) -> dict[str, torch.Tensor]:
        return {}

    def set_states(self, states: dict[str, torch.Tensor]) -> None: ...


_NO_RANDOM_STATES = (
    (megatron_random, "_CUDA_RNG_STATE_TRACKER", _NoRngTracker()),
    (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
    (megatron_random, "_get_all_rng_states", lambda: ()),
    (megatron_random, "_set_all_rng_states", lambda *states: None),
)
_CUDA_IS_THE_CPU = (
    (torch.cuda, "current_device", lambda: torch.device("cpu")),
    (torch.cuda, "synchronize", lambda *args: None),
)
