"""Whether a request can begin: every specialist's cache has blocks for it, and a step reads its whole prompt.

vLLM decides the same when it schedules. What is admitted here, it takes at once, in every engine, and never has to give
up again: of every request all blocks are counted that it may come to, whether it shares some or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ultrafuser_mega.inference.requests import Prompt


@dataclass
class Room:
    """What one specialist's engine has room for.

    Attributes:
        blocks: of its cache.
        block: tokens of one.
        step_tokens: that a step reads, at most.
        taken: blocks of the requests under way.
    """

    blocks: int
    block: int
    step_tokens: int
    taken: int = 0

    @property
    def total(self) -> int:
        """Tokens that the cache has room for."""
        return self.blocks * self.block

    @property
    def free(self) -> int:
        """Of those, what is not promised to a request."""
        return (self.blocks - self.taken) * self.block

    def wanted(self, tokens: int) -> int:
        """Blocks of a sequence of so many ``tokens``."""
        return -(-tokens // self.block)


class Rooms:
    """Of all specialists.

    Args:
        rooms: specialist -> its own.
        rows: requests under way at a time, at most.
    """

    def __init__(self, rooms: Mapping[str, Room], rows: int) -> None:
        self.of = dict(rooms)
        self._rows = rows
        self._held: dict[str, dict[str, int]] = {}  # request -> specialist -> blocks
        self._read: dict[str, int] = {}  # specialist -> tokens of the step that is made

    def begin_step(self) -> None:
        """A step is made: every request under way reads a token."""
        self._read = dict.fromkeys(self.of, len(self._held))

    def take(self, id: str, prompt: Prompt, longest: int) -> bool:
        """Whether a request begins with this step; then its room is taken."""
        wanted = {name: room.wanted(len(prompt[name]) + longest) for name, room in self.of.items()}
        fits = len(self._held) < self._rows and all(
            wanted[name] <= room.blocks - room.taken and self._read[name] + len(prompt[name]) <= room.step_tokens
            for name, room in self.of.items()
        )
        if fits:
            self._held[id] = wanted
            for name, room in self.of.items():
                room.taken += wanted[name]
                self._read[name] += len(prompt[name])
        return fits

    def leave(self, id: str) -> None:
        """A request ended."""
        for name, blocks in self._held.pop(id).items():
            self.of[name].taken -= blocks
