"""Launches of kernels as operators of PyTorch: fake tensors, profilers and dispatch modes see them.

A launch writes into tensors that its caller made, so on fake tensors there is nothing for it to do. Autograd does not
see them either: they run inside the backends' own nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("ultrafuser", "FRAGMENT")


def launch_operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function, which launches a kernel, the operator ultrafuser::<its name>; call what comes back.

    Args:
        schema: name and arguments as PyTorch's schemas have them, those marked that are written to:
            ``"double_(Tensor(a!) x)"``. Nothing is returned. Calls give the arguments by position.
    """
    name = schema.split("(")[0]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _LIBRARY.define(f"{schema} -> ()")
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ultrafuser::{name}", lambda *arguments: None, lib=_LIBRARY)
        launch: Callable[..., None] = getattr(torch.ops.ultrafuser, name).default
        return launch

    return register
