from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.counting_endpoint import CountingEndpoint


@pytest.fixture
def endpoint() -> Iterator[CountingEndpoint]:
    pytest.importorskip("openai")
    one = CountingEndpoint()
    yield one
    one.close()
