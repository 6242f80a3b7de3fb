"""Gloo groups that run one collective after another, as NCCL's communicators do.

A group that PyTorch makes has two threads (per network interface), and both write the name of the collective that they
have completed to one string, without a lock (``ProcessGroupGloo::runLoop``, as of PyTorch 2.13). A name of more than 15
characters lies on the heap: of two such collectives that end at the same time both free it, and the process dies later,
in any ``malloc``. Megatron's gathers of updated weights, all on their way at once, are such (``ALLGATHER_COALESCED``).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

#: The backend's name wherever ``torch.distributed`` takes one; importing this module makes it known.
IN_ORDER = "gloo_in_order"


def _group(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> ProcessGroupGloo:
    """Connects like ``gloo``: by the interfaces that GLOO_SOCKET_IFNAME names, or by that of the machine's name."""
    gloo = cast(Any, ProcessGroupGloo)  # its declaration leaves the options out
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]
    options._timeout = timeout
    options._threads = 1
    return cast(ProcessGroupGloo, gloo(store, rank, ranks, options))


dist.Backend.register_backend(IN_ORDER, _group, devices=["cpu", "cuda"])
