from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.played_endpoint import Server
from support.release_fixtures import *  # noqa: F403  fixtures


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("openai")
    one = Server()
    yield one
    one.http.shutdown()
    one.thread.join()
    one.http.server_close()
