"""What the vLLM engines say to each other, without vLLM: threads in place of engines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from ultrafuser_mega.inference.vllm.exchange import Following, Leading, OutOfStepError, open_group

WIDTHS = {"code": 3, "math": 5}
SHORT = timedelta(seconds=10)


def meet(*ends: Callable[[Any], Any]) -> list[Any]:
    """What each of the engines gives for its group, or raises; the first one leads."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=SHORT)
    found: list[Any] = [None] * len(ends)

    def run(rank: int) -> None:
        try:
            found[rank] = ends[rank](open_group("127.0.0.1", store.port, rank, len(ends), SHORT))
        except Exception as error:
            found[rank] = error.with_traceback(None)  # whose frames would keep the group open

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def follows(rows: list[tuple[int, int]], width: int) -> Callable[[Any], Any]:
    """An engine whose states say whose they are; it gives its tokens."""
    states = torch.tensor([[float(number)] * width for number, _ in rows], dtype=torch.bfloat16)
    return lambda group: Following(group, 4).tokens(rows, states).tolist()


def leads(rows: list[tuple[int, int]]) -> Callable[[Any], Any]:
    """The engine that chooses, for each request ten times its number."""

    def run(group: Any) -> Any:
        end = Leading(group, 4, WIDTHS, torch.bfloat16)
        states = end.gather(rows)
        end.tell(torch.tensor([10 * number for number, _ in rows]))
        return {name: part[:, -1].tolist() for name, part in states.items()}

    return run


def test_states_and_tokens_find_their_requests_whatever_order_an_engine_has_them_in() -> None:
    found = meet(
        leads([(7, 0), (3, 5), (4, 1)]),
        follows([(4, 1), (7, 0), (3, 5)], 3),
        follows([(3, 5), (4, 1), (7, 0)], 5),
    )
    assert found == [{"code": [7, 3, 4], "math": [7, 3, 4]}, [40, 70, 30], [30, 40, 70]]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([(3, 5)], "request number 7, token 0: not under way in the engine of math"),
        ([(3, 5), (7, 0), (8, 2)], "request number 8, token 2: not under way in the first specialist's engine"),
        ([(3, 5), (7, 1)], "request number 7, token 1: not under way in the first specialist's engine"),
    ],
)
def test_a_request_that_an_engine_lacks_is_named(theirs: list[tuple[int, int]], message: str) -> None:
    rows = [(7, 0), (3, 5)]
    found = meet(leads(rows), follows(rows, 3), follows(theirs, 5))
    assert isinstance(found[0], OutOfStepError)
    assert str(found[0]) == message
    assert all(isinstance(error, ConnectionError) for error in found[1:])  # nobody waits for a token
