"""What a run has done so far: a table that keeps itself up to date, or, where nobody looks, a line now and then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ultrafuser_mega.synthesis.budget import Amount
from ultrafuser_mega.synthesis.requests import GOOD

_LINE_EVERY_S = 30.0
_TABLE_EVERY_S = 0.5


@dataclass
class Count:
    """Of one step of one class; calls are what is wanted, requests what they took."""

    planned: int = 0
    ended: int = 0
    kept: int = 0
    asked: int = 0
    unusable: int = 0
    turned_away: int = 0
    failed: int = 0
    tokens: int = 0
    money: float = 0.0


class Progress:
    """Counts, and shows them.

    Args:
        console: where to.
        currency: of money; None: no model has a price, and money is not shown.

    Attributes:
        counts: by class and step.
        limits: says how many requests are, and may be, under way now.
    """

    def __init__(self, console: Console, currency: str | None = "$") -> None:
        self.counts: dict[tuple[str, str], Count] = {}
        self.limits: Callable[[], str] = lambda: ""
        self._console = console
        self._currency = currency
        self._began = time.monotonic()

    def plan(self, of: str, step: str, calls: int) -> None:
        """So many calls more are wanted."""
        self._of(of, step).planned += calls

    def ended(self, of: str, step: str) -> None:
        """A call has its answer, or will have none."""
        self._of(of, step).ended += 1

    def kept(self, of: str, step: str) -> None:
        """The ledger had a reply."""
        self._of(of, step).kept += 1

    def asked(self, of: str, step: str, verdict: str, taken: Amount) -> None:
        """A reply came."""
        count = self._of(of, step)
        count.asked += 1
        count.unusable += verdict != GOOD
        count.tokens += taken.tokens
        count.money += taken.money

    def turned_away(self, of: str, step: str) -> None:
        """A request met too many others."""
        self._of(of, step).turned_away += 1

    def failed(self, of: str, step: str, taken: Amount) -> None:
        """A request got no reply."""
        count = self._of(of, step)
        count.failed += 1
        count.tokens += taken.tokens
        count.money += taken.money

    @property
    def total(self) -> Count:
        """Of all."""
        whole = Count()
        for count in self.counts.values():
            for name, value in vars(count).items():
                setattr(whole, name, getattr(whole, name) + value)
        return whole

    def line(self) -> str:
        """All of it, shortly."""
        total, seconds = self.total, max(time.monotonic() - self._began, 1e-9)
        parts = [
            f"{total.ended:,} of {total.planned:,} calls",
            f"{total.asked:,} asked ({total.asked / seconds:.1f}/s)",
        ]
        parts += [f"{total.kept:,} from the ledger"] if total.kept else []
        parts += [f"{total.tokens:,} tokens"]
        parts += [f"{self._currency}{total.money:.4f}"] if self._currency else []
        for name, value in (("unusable", total.unusable), ("429/503", total.turned_away), ("failed", total.failed)):
            parts += [f"{value:,} {name}"] if value else []
        return " · ".join([*parts, self.limits()]).strip(" ·")

    def table(self) -> Table:
        """A row for each step of each class."""
        table = Table(box=None, pad_edge=False)
        for name in ("class", "step"):
            table.add_column(name)
        money = [escape(self._currency)] if self._currency else []
        for name in ("calls", "kept", "asked", "unusable", "429/503", "failed", "tokens", *money):
            table.add_column(name, justify="right")
        for (of, step), count in self.counts.items():
            numbers = [f"{count.ended:,}/{count.planned:,}", count.kept, count.asked, count.unusable]
            numbers += [count.turned_away, count.failed, count.tokens]
            cells = [number if isinstance(number, str) else f"{number:,}" for number in numbers]
            table.add_row(of or "-", step, *cells, *([f"{count.money:.4f}"] if money else []))
        return table

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it while an event loop runs."""
        live = Live(console=self._console, auto_refresh=False, transient=True) if self._console.is_terminal else None

        async def show() -> None:
            while True:
                await asyncio.sleep(_TABLE_EVERY_S if live else _LINE_EVERY_S)
                if live:
                    table = self.table()
                    table.caption = escape(self.line())
                    live.update(table, refresh=True)
                else:
                    self._console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

        if live:
            live.start()
        task = asyncio.get_running_loop().create_task(show())
        try:
            yield
        finally:
            task.cancel()
            if live:
                live.stop()

    def _of(self, of: str, step: str) -> Count:
        return self.counts.setdefault((of, step), Count())
