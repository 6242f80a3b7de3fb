"""Which place of a specialist's cache holds which token: handing out, sharing what prompts have in common, forgetting.

A cache has places for a number of tokens. A sequence takes a place for every token that it may come to, so that it
never has to stop for want of room. What was read stays when its sequence ends, found again by the tokens before it,
until the room is needed: then what was not used for the longest time goes first, the ends of sequences before their
beginnings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

NOWHERE = 0  # a place that no sequence gets: padding is read from there


class Slots:
    """The places of one cache.

    Args:
        total: how many tokens it has room for, beside the one at ``NOWHERE``.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._empty = list(range(total, NOWHERE, -1))
        self._users = [0] * (total + 1)
        # What may be found again: (place of the token before it, token) -> place, and the other way round.
        self._found: dict[tuple[int, int], int] = {}
        self._keys: dict[int, tuple[int, int]] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # of those, what no sequence uses; the oldest first

    @property
    def free(self) -> int:
        """Tokens that there is room for."""
        return len(self._empty) + len(self._unused)

    def known(self, ids: Sequence[int]) -> list[int]:
        """Places of the longest beginning of ``ids`` that is held."""
        places: list[int] = []
        before = NOWHERE
        for token in ids:
            place = self._found.get((before, token))
            if place is None:
                break
            places.append(place)
            before = place
        return places

    def fits(self, known: Sequence[int], more: int) -> bool:
        """Whether there is room for ``take``."""
        return more <= self.free - sum(place in self._unused for place in known)

    def take(self, known: Sequence[int], more: int) -> list[int]:
        """Places for a sequence that fits.

        Args:
            known: places that it shares, as ``known`` gave them.
            more: places of its own.
        """
        for place in known:
            self._users[place] += 1
            self._unused.pop(place, None)
        own = [self._empty.pop() if self._empty else self._forget() for _ in range(more)]
        for place in own:
            self._users[place] = 1
        return [*known, *own]

    def keep(self, places: list[int], ids: Sequence[int]) -> bool:
        """Let what a sequence has read be found again.

        Where another sequence has brought the same, this one goes on with the other's place and its own becomes empty.

        Args:
            places: of the sequence, which is under way; changed where it goes on with others.
            ids: the tokens that the first of them hold.

        Returns:
            Whether any place changed.
        """
        before, changed = NOWHERE, False
        for at, token in enumerate(ids):
            place = places[at]
            found = self._found.setdefault((before, token), place)
            if found == place:
                self._keys[place] = before, token
            else:
                changed = True
                places[at] = found
                self._users[found] += 1
                self._unused.pop(found, None)
                self._users[place] = 0
                self._empty.append(place)
            before = found
        return changed

    def give(self, places: Sequence[int]) -> None:
        """A sequence ended."""
        for place in reversed(places):
            self._users[place] -= 1
            if self._users[place]:
                continue
            if place in self._keys:
                self._unused[place] = None
            else:
                self._empty.append(place)

    def _forget(self) -> int:
        place, _ = self._unused.popitem(last=False)
        del self._found[self._keys.pop(place)]
        return place
