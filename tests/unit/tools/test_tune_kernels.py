"""The kernel tuner without a GPU: what it calls runs, interpreted, and how it keeps its books."""

from __future__ import annotations

from typing import Any

import pytest
from support.scripts import script


def every_kernel_once() -> tuple[set[str], set[str]]:
    import torch
    from benchmark import Shape

    tuner = script("tune_kernels")
    calls = tuner.kernel_calls(Shape(20, 333, (16, 24, 8), torch.bfloat16), torch.device("cpu"))
    for call in calls.values():
        call()
    return set(calls), set(tuner.CANDIDATES)


def test_every_kernel_that_has_candidates_is_called_as_the_loss_calls_it(interpreted: Any) -> None:
    called, tuned = interpreted(every_kernel_once)
    assert called == tuned


def test_the_fastest_comes_first_a_failure_last_and_the_table_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = script("tune_kernels")
    table = {"kernel": (64, 4)}
    times = {(64, 4): 2.0, (128, 8): 1.0}
    monkeypatch.setattr(tuner, "timed", lambda call: {"ms": call()})

    def call() -> float:
        if table["kernel"] not in times:
            raise ValueError("out of shared memory\nby 10 bytes")
        return times[table["kernel"]]

    records = tuner.tune(call, table, "kernel", [(64, 4), (256, 8), (128, 8), (64, 4)])
    assert records == [
        {"config": (128, 8), "in_use": False, "ms": 1.0},
        {"config": (64, 4), "in_use": True, "ms": 2.0},
        {"config": (256, 8), "in_use": False, "failed": "out of shared memory"},
    ]
    assert table == {"kernel": (64, 4)}


def blocks_of_the_gate_only_forward() -> list[tuple[int, int]]:
    """(columns of a block, products with the heads) as the tuner tries them on a small problem."""
    import torch
    from benchmark import Shape

    from ultrafuser_mega.ops import gemm

    tuner: Any = script("tune_kernels")
    table, key = tuner.table_of(tuner.GATE_BLOCKS, 90)
    assert (key, table[key]) == ("cuda", 8192)
    table = table | {}
    tuner.forward.BLOCK_COLUMNS = table
    call = tuner.kernel_calls(Shape(4, 70, (8, 8), torch.float32), torch.device("cpu"))[tuner.GATE_BLOCKS]
    found: list[tuple[int, int]] = []
    accumulate = gemm.accumulate

    def counted(*arguments: Any, **options: Any) -> Any:
        found[-1] = (table["cpu"], found[-1][1] + 1)
        return accumulate(*arguments, **options)

    def timed(function: Any) -> Any:
        found.append((0, 0))
        loss, _ = function()
        assert loss.requires_grad
        return {"ms": 1.0}

    gemm.accumulate, tuner.timed = counted, timed
    tuner.tune(call, table, "cpu", [32, 64, 128])
    return found


def test_blocks_of_columns_reach_the_gate_only_loss_that_is_timed(interpreted: Any) -> None:
    assert interpreted(blocks_of_the_gate_only_forward) == [(32, 2 * 3), (64, 2 * 2), (128, 2 * 1)]
