"""Functions as operators of PyTorch: fake tensors, profilers and dispatch modes see them.

Autograd does not: they run inside autograd nodes of this package. They are registered in a library of PyTorch's, whose
calls cost the host 6 us where those of ``torch.library`` functions that wrap a function whole cost 30.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("ultrafuser", "FRAGMENT")


def register(
    schema: str,
    function: Callable[..., Any],
    empty: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make ``function`` the operator ultrafuser::<the schema's name>, which takes its arguments by position.

    Args:
        schema: name, arguments and results as PyTorch's schemas have them.
        function: on every device.
        empty: from the arguments the results without numbers, for fake tensors.
        cuda: in place of ``function`` on CUDA.
        cpu: likewise on CPUs.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    for key, kernel in (("CUDA", cuda), ("CPU", cpu)):
        if kernel is not None:
            _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"ultrafuser::{name}", empty, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.ultrafuser, name).default
    return operator


def launch_operator(arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function, which launches a kernel, an operator; call what comes back.

    A launch writes into tensors that its caller made, so on fake tensors there is nothing for it to do.

    Args:
        arguments: name and arguments as PyTorch's schemas have them, those marked that are written to:
            ``"double_(Tensor(a!) x)"``. Nothing is returned.
    """
    return lambda function: register(f"{arguments} -> ()", function, lambda *given: None)
