"""An asker over an endpoint that misbehaves, for tests of what is asked again and what is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from support.counting_endpoint import Body, CountingEndpoint
from support.small_synthesis import small_config

from ultrafuser_mega.synthesis.client import Asker
from ultrafuser_mega.synthesis.forms import any_text
from ultrafuser_mega.synthesis.ledger import Ledger
from ultrafuser_mega.synthesis.progress import Progress
from ultrafuser_mega.synthesis.requests import Answer, Call

Wrong = tuple[int, dict[str, str], str]


def calls(number: int, step: str = "responses") -> list[Call]:
    messages = [({"role": "user", "content": f"question {place}"},) for place in range(number)]
    return [Call("text", step, one, any_text()) for one in messages]


class Run:
    """An asker over a folder, for one test."""

    def __init__(self, folder: Path, endpoint: CountingEndpoint, **keys: Any) -> None:
        self.config = small_config(endpoint.url, **keys)
        self.ledger = Ledger(folder)
        self.progress = Progress(Console(quiet=True))
        self.asker: Asker | None = None

    def ask(self, wanted: list[Call]) -> list[Answer]:
        async def play() -> list[Answer]:
            self.asker = Asker(self.config, self.ledger, self.progress)
            try:
                return await self.asker.ask_all(wanted)
            finally:
                await self.asker.close()

        return asyncio.run(asyncio.wait_for(play(), 60))


def once(wrong: Wrong) -> Callable[[Body], Wrong | None]:
    """The first attempt at every request goes wrong, equal requests that come later do not."""
    met: set[str] = set()

    def misbehave(body: Body) -> Wrong | None:
        text = json.dumps(body, sort_keys=True)
        if text in met:
            return None
        met.add(text)
        return wrong

    return misbehave
