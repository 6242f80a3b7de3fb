"""Which specialist computes on which devices, as --device says it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ultrafuser_mega.errors import InputError


def places_of(devices: str, names: Sequence[str]) -> dict[str, list[int | None]]:
    """Specialist -> its GPUs, or None for each of its shards on the CPU.

    Args:
        devices: "auto" (a GPU for each where there are enough, else one for all, else the CPU), or one place for all,
            or one for each; a place is "cpu", "cuda", "cuda:N" or several joined by "+", which share the specialist.
        names: of the specialists.

    Raises:
        InputError: a device is not there.
    """
    gpus = torch.cuda.device_count()
    if devices == "auto":
        if gpus == 0:
            return {name: [None] for name in names}
        return {name: [place if gpus >= len(names) else 0] for place, name in enumerate(names)}
    given = devices.split(",")
    if len(given) not in (1, len(names)):
        raise InputError(f"--device {devices}: names {len(given)} places; give one, or one for each of {list(names)}")
    places = [_place(devices, text, gpus) for text in given]
    return dict(zip(names, places * (len(names) if len(places) == 1 else 1), strict=True))


def _place(devices: str, text: str, gpus: int) -> list[int | None]:
    parts = text.split("+")
    if set(parts) == {"cpu"}:
        return [None] * len(parts)
    known = {f"cuda:{index}": index for index in range(gpus)} | ({"cuda": 0} if gpus else {})
    if not set(parts) <= set(known) or len({known[part] for part in parts}) < len(parts):
        raise InputError(
            f"--device {devices}: {text!r}: expected auto, cpu, cuda:N or several joined by +; "
            f"this machine has {gpus} GPUs"
        )
    return [known[part] for part in parts]
