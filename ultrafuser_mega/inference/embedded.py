"""The embedded engine for an opened model: how much its caches may hold, and whether its specialists draft."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.cache import bytes_per_token
from ultrafuser_mega.inference.engine import EmbeddedEngine
from ultrafuser_mega.inference.lanes import positions_of
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.text_engine import TextEngine
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

_OF_GPU, _OF_MAIN_MEMORY = 0.8, 0.25  # of what is free: on a CPU others want some too
_DRAFT = 8


@dataclass(frozen=True)
class Serving:
    """How answers are computed.

    Attributes:
        rows: answers under way at a time, at most.
        memory: GiB for the caches of all specialists; None: as ``rows`` of the longest need, or a good part of what is
            free, the smaller of the two.
        draft: tokens that the leading specialist drafts, or that are guessed for the only one, at most, 0: none;
            None: 8 where specialists share a device or there is one, none where each has its own, since all others
            would wait for the one that drafts.
    """

    rows: int = 64
    memory: float | None = None
    draft: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise InputError(f"--memory {self.memory}: expected GiB, above 0")
        if self.draft is not None and self.draft < 0:
            raise InputError(f"--draft {self.draft}: expected 0 (none) or more")


def text_engine(opened: OpenedModel, serving: Serving) -> TextEngine:
    """An engine in this process, whose answers are text.

    Raises:
        InputError: ``--memory`` has not even room for two tokens.
    """
    model = opened.model
    devices = {next(model.specialists[name].parameters()).device for name in model.names}
    apart = len(model.names) > 1 and len(devices) == len(model.names)
    draft = (0 if apart else _DRAFT) if serving.draft is None else serving.draft
    tokens = cache_tokens(model, serving.rows, serving.memory)
    engine = EmbeddedEngine(model, opened.rule, tokens=tokens, rows=serving.rows, draft=draft)
    return TextEngine(engine, opened.tokenizer, model.config.response_lead, opened.eos)


def cache_tokens(model: UltraFuserForCausalLM, rows: int, memory: float | None = None) -> int:
    """Tokens that each specialist's cache has room for; see :class:`Serving`."""
    positions = max(positions_of(model).values())
    sizes = {name: bytes_per_token(model, name) for name in model.names}
    if memory is not None:
        tokens = int(memory * 2**30) // sum(sizes.values())
        if tokens < 2:
            raise InputError(f"--memory {memory}: a token takes {sum(sizes.values()) / 2**30:.2g} GiB; give more")
        return min(tokens, rows * positions)
    on: dict[torch.device, int] = {}
    for name, size in sizes.items():
        device = next(model.specialists[name].parameters()).device
        on[device] = on.get(device, 0) + size
    return min(rows * positions, *(_free(device) // size for device, size in on.items()))


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_OF_GPU * torch.cuda.mem_get_info(device)[0])
    return int(_OF_MAIN_MEMORY * psutil.virtual_memory().available)
