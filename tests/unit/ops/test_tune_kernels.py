"""The kernel tuner without a GPU: what it calls runs, interpreted, and how it keeps its books."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

TOOL = Path(__file__).parents[3] / "tools" / "tune_kernels.py"


def tool():
    spec = importlib.util.spec_from_file_location("tune_kernels", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every_kernel_once() -> tuple[set[str], set[str]]:
    from ultrafuser_mega.ops.benchmark import Shape

    tuner = tool()
    calls = tuner.kernel_calls(Shape(20, 333, (16, 24, 8), torch.bfloat16), torch.device("cpu"))
    for call in calls.values():
        call()
    return set(calls), set(tuner.CANDIDATES)


def test_every_kernel_that_has_candidates_is_called_as_the_loss_calls_it(interpreted):
    called, tuned = interpreted(every_kernel_once)
    assert called == tuned


def test_the_fastest_comes_first_a_failure_last_and_the_table_is_left_alone(monkeypatch):
    tuner = tool()
    table = {"kernel": (64, 4)}
    times = {(64, 4): 2.0, (128, 8): 1.0}
    monkeypatch.setattr(tuner, "median_ms", lambda call: call())

    def call() -> float:
        if table["kernel"] not in times:
            raise ValueError("out of shared memory\nby 10 bytes")
        return times[table["kernel"]]

    records = tuner.tune(call, table, "kernel", [(64, 4), (256, 8), (128, 8), (64, 4)])
    assert records == [
        {"config": (128, 8), "ms": 1.0},
        {"config": (64, 4), "ms": 2.0},
        {"config": (256, 8), "failed": "out of shared memory"},
    ]
    assert table == {"kernel": (64, 4)}
