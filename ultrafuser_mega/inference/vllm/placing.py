"""Where the engines compute and how much they hold: what a user wants as a job for each process."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.cache import bytes_per_token
from ultrafuser_mega.inference.devices import places_of
from ultrafuser_mega.inference.embedded import cache_tokens
from ultrafuser_mega.inference.lanes import positions_of
from ultrafuser_mega.inference.vllm.messages import Job
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

_OF_GPU = 0.9
_SPARE_TOKENS = 128  # of vLLM's largest block: one block stands for none


@dataclass(frozen=True)
class Placing:
    """How and where the specialists are computed.

    Attributes:
        devices: "auto" (a GPU for each where there are enough, else one for all, else the CPU), or one place for all,
            or one for each; a place is "cpu", "cuda:N" or several joined by "+", which share the specialist by tensor
            parallelism, as in "cuda:0+cuda:1,cuda:2,cuda:3".
        rows: answers under way at a time, at most.
        memory: GiB for the caches of all specialists; None: by what is free.
    """

    devices: str = "auto"
    rows: int = 64
    memory: float | None = None


def jobs_of(model: UltraFuserForCausalLM, folders: Mapping[str, Path], placing: Placing) -> dict[str, Job]:
    """Specialist -> what its process runs.

    Args:
        model: its weights unread.
        folders: specialist -> its config.json's.
        placing: what is wanted.

    Raises:
        InputError: a device is not there, or ``memory`` has no room.
    """
    places = places_of(placing.devices, model.names)
    positions = positions_of(model)
    engines = Counter(device for devices in places.values() for device in devices)
    shared = [device for device, count in engines.items() if device is not None and count > 1]
    if shared and placing.memory is None:  # each would measure what is free while the others take it
        raise InputError(f"--memory: give it, as specialists share cuda:{shared[0]} (GiB for the caches of all)")
    cores = len(os.sched_getaffinity(0))
    tokens = None
    if placing.memory is not None or None in engines:
        tokens = cache_tokens(model, placing.rows, placing.memory)
    jobs = {}
    for name, devices in places.items():
        held = None if tokens is None else (tokens + _SPARE_TOKENS) * bytes_per_token(model, name) // len(devices)
        jobs[name] = Job(
            str(folders[name]),
            str(model.dtype).removeprefix("torch."),
            devices,
            placing.rows,
            positions[name],
            positions[name] + placing.rows,
            held,
            _OF_GPU / max(engines[device] for device in devices),
            max(1, cores // sum(engines.values())),
        )
    return jobs
