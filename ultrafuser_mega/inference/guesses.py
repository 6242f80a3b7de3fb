"""What may come next by what followed the same tokens before, in the prompt or in the answer itself.

Prompt lookup (Saxena, 2023; Yang et al., 2023): answers repeat names, formulas, lines of code, themselves. It costs no
pass of any model, and whoever reads such a guess reads several tokens in one pass where it would have read one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Guesses:
    """The tokens of one sequence, by the two or the one in front of each, the latest place counting."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # tokens -> the place behind them

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Iterable[int]) -> None:
        """The sequence goes on with these."""
        for token in ids:
            for size in (1, 2):
                if len(self._ids) >= size:
                    self._followed[tuple(self._ids[-size:])] = len(self._ids)
            self._ids.append(token)

    def behind(self, more: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow the sequence and ``more``; [] where nothing is alike."""
        end = [*self._ids[-2:], *more[-2:]][-2:]
        for size in (2, 1):
            if (place := self._followed.get(tuple(end[-size:]))) is not None:
                return self._ids[place : place + most]
        return []
