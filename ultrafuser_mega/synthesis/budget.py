"""A limit that is never passed: the most that a request can take is set aside before it is sent."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ultrafuser_mega.synthesis.config import Limit, Price


class LimitReachedError(Exception):
    """Nothing more can be sent without the danger of passing the limit that the message names."""


@dataclass(frozen=True)
class Amount:
    """What requests take."""

    requests: int = 0
    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.requests + other.requests, self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.requests - other.requests, self.tokens - other.tokens, self.money - other.money)


def cost_of(price: Price | None, read: int, written: int, *, batch: bool = False) -> float:
    """Money for so many tokens; 0 without a price."""
    if price is None:
        return 0.0
    return (price.read * read + price.written * written) / 1e6 * (price.batch if batch else 1.0)


class Budget:
    """What is spent, what is set aside, and what may be.

    Args:
        limit: of all, together with what was spent before.
        spent: before.
        currency: for messages.
    """

    def __init__(self, limit: Limit, spent: Amount, currency: str = "$") -> None:
        self.limit = limit
        self.spent = spent
        self.reserved = Amount()
        self._currency = currency
        self._changed = asyncio.Condition()

    async def reserve(self, most: Amount) -> None:
        """Set aside, once there is room for it; what is under way may leave some.

        Raises:
            LimitReachedError: there is no room, and nothing under way that could make it.
        """
        async with self._changed:
            while not self.try_reserve(most):
                if not self.reserved.requests:
                    raise LimitReachedError(self._reason(most))
                await self._changed.wait()

    def try_reserve(self, most: Amount) -> bool:
        """Set aside if there is room."""
        fits = self._passed(self.spent + self.reserved + most) is None
        if fits:
            self.reserved += most
        return fits

    async def settle(self, most: Amount, taken: Amount) -> None:
        """A request that ``most`` was set aside for is over, and took this."""
        async with self._changed:
            self.reserved -= most
            self.spent += taken
            if not self.reserved.requests:  # no dust of many sums
                self.reserved = Amount()
            self._changed.notify_all()

    def _passed(self, amount: Amount) -> str | None:
        limit = self.limit
        if limit.requests is not None and amount.requests > limit.requests:
            return "requests"
        if limit.tokens is not None and amount.tokens > limit.tokens:
            return "tokens"
        return "money" if limit.money is not None and amount.money > limit.money else None

    def _reason(self, most: Amount) -> str:
        name = self._passed(self.spent + most)
        if name == "money":
            return (
                f"limit.money={self.limit.money:g} is reached: {self._currency}{self.spent.money:.4f} are spent, and "
                f"the next request may take up to {self._currency}{most.money:.4f}"
            )
        spent, wanted = (getattr(amount, str(name)) for amount in (self.spent, most))
        most_allowed = getattr(self.limit, str(name))
        return f"limit.{name}={most_allowed} is reached: {spent:,} are used, and the next request may take {wanted:,}"
