"""On a CPU, Megatron's names of CUDA mean the CPU: inside its scope, whatever other modes of torch's are open."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ultrafuser_mega.runtime.mcore import megatron_scope

CPU = torch.device("cpu")


class Counting(TorchFunctionMode):
    """Counts calls of torch's functions."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def device_of_a_tensor_on_cuda() -> str:
    return torch.zeros(1, device="cuda").device.type


def test_layers_run_without_the_scopes_mode_and_megatron_with_it() -> None:
    with megatron_scope(CPU) as names_as_they_are:
        assert device_of_a_tensor_on_cuda() == "cpu"
        with names_as_they_are():
            assert _get_current_function_mode() is None
            with names_as_they_are():
                assert _get_current_function_mode() is None
        assert device_of_a_tensor_on_cuda() == "cpu"
    assert _get_current_function_mode() is None


def test_a_mode_that_someone_opens_in_the_scope_sees_the_layers_and_closes_as_it_should() -> None:
    with megatron_scope(CPU) as names_as_they_are:
        with Counting() as counting:
            with names_as_they_are(), Counting() as inner:
                torch.zeros(1)
            assert (counting.calls, inner.calls) == (1, 1)
            assert _get_current_function_mode() is counting
        assert device_of_a_tensor_on_cuda() == "cpu"
    assert _get_current_function_mode() is None
