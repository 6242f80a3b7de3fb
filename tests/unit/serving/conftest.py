"""A served model whose engine says what a test has it say, and the same model with an engine that computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.live_server import LiveServer
from support.played_engine import PlayedEngine
from support.release_fixtures import releases, specialists  # noqa: F401  fixtures

from ultrafuser_mega.inference.embedded import Serving, text_engine
from ultrafuser_mega.inference.model import OpenedModel, opened_model
from ultrafuser_mega.inference.text_engine import TextEngine

for module in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance"):
    pytest.importorskip(module, reason="pip install 'ultrafuser_mega[serve]'")


@pytest.fixture(scope="session")
def opened(releases: dict[str, Path]) -> Iterator[OpenedModel]:  # noqa: F811
    with opened_model(str(releases["llamas"]), "cpu", None) as model:
        yield model


@pytest.fixture(scope="session")
def says(opened: OpenedModel) -> Callable[[str], list[int]]:
    """The tokens of an answer."""
    return lambda text: [*opened.tokenizer(f"x {text}", add_special_tokens=False)["input_ids"][2:], 2]


@pytest.fixture
def engine(opened: OpenedModel, says: Callable[[str], list[int]]) -> PlayedEngine:
    return PlayedEngine(opened.model.names, lambda request: says("London is the largest city."))


def as_text(engine: PlayedEngine, opened: OpenedModel) -> TextEngine:
    return TextEngine(engine, opened.tokenizer, opened.model.config.response_lead, opened.eos)


Serve = Callable[..., LiveServer]


@pytest.fixture
def serve(opened: OpenedModel, engine: PlayedEngine) -> Iterator[Serve]:
    """Starts a server of the played engine with other settings; all end with the test."""
    started: list[LiveServer] = []

    def start(engine: PlayedEngine = engine, **settings: Any) -> LiveServer:
        started.append(LiveServer(opened, as_text(engine, opened), **settings))
        return started[-1]

    yield start
    for live in started:
        live.stop()


@pytest.fixture
def server(serve: Serve) -> LiveServer:
    return serve()


@pytest.fixture(scope="session")
def computing(opened: OpenedModel) -> Iterator[LiveServer]:
    """A server whose engine computes; nobody stops it."""
    live = LiveServer(opened, text_engine(opened, Serving(rows=8, draft=2)))
    yield live
    live.stop()


@pytest.fixture
def question() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Which city is the largest?"}]}
