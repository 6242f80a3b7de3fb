"""AdamW whose moments and float32 weights lie in host memory, and on the device for the length of their update alone.

They lie in blocks. A block is copied to the device and updated there with the gradients, which never left, by torch's
fused AdamW: the kernel that updates them where they stay on the device, on the same numbers, so that the results are
the same to the last bit. It travels back while the next one comes. The device holds two blocks meanwhile, the host
waits for nothing. On a CPU host memory is the device's, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BLOCK = 1 << 27  # bytes; what is pinned takes a power of two
SLOTS = 2  # blocks on the device during an update
_ALIGNED = 64  # numbers: kernels take several at once, the same ones wherever a parameter is cut
_MOMENTS = ("exp_avg", "exp_avg_sq")

#: Kind -> (elements of what is flattened, float32; the first one's place in the whole parameter), ...
Runs = dict[str, list[tuple[Tensor, int]]]


@dataclass(frozen=True)
class Updated:
    """What a rank updates of a parameter.

    parameter  of the model
    owned      which elements of it, flattened
    main       Megatron's tensor of these elements, whose ``grad`` it sets: of the weight itself, or a float32 copy
    group      of the optimizer: rates, decay
    """

    parameter: nn.Parameter
    owned: slice
    main: Tensor
    group: Mapping[str, Any]

    @property
    def weight(self) -> Tensor:
        """(n,) of the model."""
        return self.parameter.detach().view(-1)[self.owned]


@dataclass(frozen=True)
class _Piece:
    """``size`` elements of a parameter's from ``start`` on, at ``place`` of a block."""

    of: Updated
    start: int
    size: int
    place: int

    def cut(self, flat: Tensor) -> Tensor:
        """Of all elements that are updated."""
        return flat[self.start : self.start + self.size]

    def held(self, row: Tensor) -> Tensor:
        """Of a row of the block."""
        return row[self.place : self.place + self.size]


@dataclass
class _Block:
    """Pieces of one parameter group.

    held (kinds, numbers): both moments, and float32 weights where the model's are ``narrow``.
    """

    group: Mapping[str, Any]
    narrow: bool
    pieces: list[_Piece] = field(default_factory=list)
    held: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def numbers(self) -> int:
        last = self.pieces[-1] if self.pieces else None
        return 0 if last is None else -(-(last.place + last.size) // _ALIGNED) * _ALIGNED


class HostStates:
    """See the module.

    Args:
        updated: all that this rank updates. Megatron's float32 copies give their memory back.
        device: the model's.
        apart: whether that memory is another than the host's; default: unless it is the CPU's.

    Attributes:
        steps: that were done.
    """

    def __init__(self, updated: Sequence[Updated], device: torch.device, *, apart: bool | None = None) -> None:
        self.steps = 0
        self._device = device
        self._apart = device.type != "cpu" if apart is None else apart
        self._back = torch.Stream(device) if device.type != "cpu" else None
        self._blocks = _blocks_of(updated)
        self._arrived: torch.Event | None = None
        self._runs: dict[nn.Parameter, Runs] = {}
        for block in self._blocks:
            held = torch.zeros(2 + block.narrow, block.numbers)
            block.held = held.pin_memory() if device.type == "cuda" else held
            for piece in block.pieces:
                runs = self._runs.setdefault(piece.of.parameter, {})
                first = (piece.of.owned.start or 0) + piece.start
                for kind, row in zip((*_MOMENTS, "param"), block.held, strict=False):
                    runs.setdefault(kind, []).append((piece.held(row), first))
        self.reload()
        nothing = torch.zeros((), device=device)
        for one in updated:
            if one.main.dtype != one.parameter.dtype:  # stands for its gradient from now on
                one.main.data = nothing.expand(one.main.shape)

    @property
    def nbytes(self) -> int:
        """Of host memory."""
        return sum(block.held.numel() * block.held.element_size() for block in self._blocks)

    def runs(self, parameter: nn.Parameter) -> Runs:
        """What is held of a parameter: both moments, and ``param`` where the model's weight is narrow."""
        return self._runs[parameter]

    @torch.no_grad()
    def reload(self) -> None:
        """Take the float32 weights from the model's."""
        for block in self._blocks:
            for piece in block.pieces if block.narrow else ():
                piece.held(block.held[2]).copy_(piece.cut(piece.of.weight))

    def settle(self) -> None:
        """Until all is in host memory, for who reads it there."""
        if self._arrived is not None:
            self._arrived.synchronize()

    @torch.no_grad()
    def update(self) -> None:
        """Take AdamW's step with the gradients of Megatron's tensors, and give the model its weights."""
        largest = max((block.held.numel() for block in self._blocks), default=0)
        ferry = _Ferry(self._device, largest, self._back) if self._apart else None
        for block in self._blocks:
            if ferry is None:
                self._step(block, block.held)
            else:
                here = ferry.fetch(block.held)
                self._step(block, here)
                ferry.bring_back(here, block.held)
        self.steps += 1
        if ferry is not None:
            self._arrived = ferry.end()

    def _step(self, block: _Block, here: Tensor) -> None:
        group, pieces = block.group, block.pieces
        rows = [[piece.held(row) for piece in pieces] for row in here]
        weights = [piece.cut(piece.of.weight) for piece in pieces]
        gradients = [piece.cut(_gradient(piece.of.main)) for piece in pieces]
        beta1, beta2 = group["betas"]
        adamw(
            rows[2] if block.narrow else weights,
            gradients,
            rows[0],
            rows[1],
            [],
            list(torch.full((len(pieces),), float(self.steps), device=self._device).unbind()),
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if block.narrow:
            torch._foreach_copy_(weights, rows[2])


class _Ferry:
    """Copies blocks to the device and back: one comes, on the current stream, while that before leaves on another."""

    def __init__(self, device: torch.device, numbers: int, back: torch.Stream | None) -> None:
        self._room = torch.empty(SLOTS, numbers, device=device)
        self._turn = 0
        self._streams = None if back is None else (torch.accelerator.current_stream(device), back)
        self._left: list[torch.Event | None] = [None] * SLOTS  # when a slot was empty again

    def fetch(self, held: Tensor) -> Tensor:
        """The block on the device."""
        self._turn = (self._turn + 1) % SLOTS
        if self._streams is not None and (left := self._left[self._turn]) is not None:
            self._streams[0].wait_event(left)
        here = self._room[self._turn, : held.numel()].view(held.shape)
        return here.copy_(held, non_blocking=True)

    def bring_back(self, here: Tensor, held: Tensor) -> None:
        """The same after what the current stream has been told."""
        if self._streams is None:
            held.copy_(here)
            return
        now, back = self._streams
        back.wait_stream(now)
        with back:
            held.copy_(here, non_blocking=True)
        self._left[self._turn] = back.record_event()

    def end(self) -> torch.Event | None:
        """Have the current stream wait for the other, so that slots may be used otherwise; when all has arrived."""
        if self._streams is None:
            return None
        now, back = self._streams
        now.wait_stream(back)
        return back.record_event()


def _blocks_of(updated: Sequence[Updated]) -> list[_Block]:
    """Parameters of a group one behind the other, cut where a block is full."""
    found: list[_Block] = []
    filling: dict[tuple[int, bool], _Block] = {}
    for one in updated:
        narrow = one.parameter.dtype != torch.float32
        most = BLOCK // (4 * (2 + narrow)) // _ALIGNED * _ALIGNED
        start, whole = 0, one.weight.numel()
        while start < whole:
            block = filling.get((id(one.group), narrow))
            if block is None or block.numbers == most:
                block = filling[id(one.group), narrow] = _Block(one.group, narrow)
                found.append(block)
            size = min(whole - start, most - block.numbers)
            block.pieces.append(_Piece(one, start, size, block.numbers))
            start += size
    return found


def _gradient(main: Tensor) -> Tensor:
    assert main.grad is not None
    return main.grad.view(-1)
