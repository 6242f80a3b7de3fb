"""The benchmark's own bookkeeping, on a shape too small to mean anything."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from typing import Any

import benchmark
import pytest
import torch
from benchmark import FLOOR, TASKS, Inputs, Shape

SHAPE = Shape(16, 40, (8, 4), torch.float32)


def test_every_variant_takes_part_in_every_round_beside_the_floor() -> None:
    inputs = Inputs(SHAPE, torch.device("cpu"))
    losses = {"chunked": benchmark.ours("chunked"), "plain PyTorch": benchmark.plain()}
    for task in TASKS:
        results = benchmark.measure(inputs, task, losses, repeats=3)
        assert [result.variant for result in results] == [FLOOR, *losses]
        assert all(len(result.seconds) == 3 and result.median > 0 for result in results)


def test_all_variants_compute_the_same_loss() -> None:
    inputs = Inputs(SHAPE, torch.device("cpu"))
    inputs.require((True, False, False))
    values = [benchmark.ours(name)(inputs) for name in ("chunked", "gate_only")] + [benchmark.plain()(inputs)]
    torch.testing.assert_close(torch.stack(values), values[0].expand(3), rtol=1e-5, atol=1e-5)


def test_a_variant_that_fails_is_left_out_with_its_reason() -> None:
    def broken(_inputs: Inputs) -> torch.Tensor:
        raise RuntimeError("out of memory\nwith details")

    failed: dict[str, str] = {}
    results = benchmark.measure(Inputs(SHAPE, torch.device("cpu")), "train", {"broken": broken}, 1, failed)
    assert [result.variant for result in results] == [FLOOR]
    assert failed == {"train: broken": "out of memory"}


def test_a_variant_that_computes_something_else_is_not_timed() -> None:
    failed: dict[str, str] = {}
    losses = {"half": lambda inputs: benchmark.plain()(inputs) / 2, "chunked": benchmark.ours("chunked")}
    results = benchmark.measure(Inputs(SHAPE, torch.device("cpu")), "train", losses, 1, failed)
    assert [result.variant for result in results] == [FLOOR, "chunked"]
    assert failed["train: half"].startswith("gives a loss of ")


def test_gradient_bytes_count_what_the_task_trains() -> None:
    inputs = Inputs(SHAPE, torch.device("cpu"))
    gate, hidden, heads = 16 * 2 * 4, 16 * (8 + 4) * 4, 40 * (8 + 4) * 4
    assert inputs.require(TASKS["gate_only"][0]) == gate
    assert inputs.require(TASKS["train"][0]) == gate + hidden + heads


def test_every_rank_has_the_same_rows_and_its_share_of_the_heads_which_may_be_empty() -> None:
    ranks = [Inputs(replace(SHAPE, vocab=5), torch.device("cpu"), shard, 4) for shard in range(4)]
    assert [rank.vocab_start for rank in ranks] == [0, 2, 4, 5]
    assert [rank.heads[0].shape[0] for rank in ranks] == [2, 2, 1, 0]
    for rank in ranks[1:]:
        assert torch.equal(rank.gate_logits, ranks[0].gate_logits)
        assert torch.equal(rank.target, ranks[0].target)
        assert all(map(torch.equal, rank.hidden, ranks[0].hidden))
    assert not torch.equal(ranks[0].heads[0], ranks[1].heads[0])


def test_what_is_called_compiled_is_compiled_for_every_shape_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes and tasks than dynamo compiles of one function before it gives up and runs it eagerly."""
    graphs = []

    def backend(graph: Any, _examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, dynamic=False))
    tokens = range(2, 2 + torch._dynamo.config.recompile_limit)
    for count in tokens:
        inputs = Inputs(replace(SHAPE, tokens=count), torch.device("cpu"))
        assert len(benchmark.measure(inputs, "train", {"torch.compile": benchmark.compiled()}, 1)) == 2
        assert len(benchmark.measure(inputs, "forward", {"torch.compile": benchmark.compiled()}, 1)) == 2
    assert len(graphs) == 2 * len(tokens)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_peak_memory_counts_what_a_call_takes_even_where_freed_memory_lies_ready() -> None:
    """64 MiB in pieces that the C library serves from its heap, of which 128 MiB have just been freed."""
    inputs = Inputs(SHAPE, torch.device("cpu"))

    def pieces(mib: int) -> list[torch.Tensor]:
        return [torch.ones(16, 1024) for _ in range(mib * 16)]  # 64 KiB each

    freed = pieces(128)
    last = freed[-1]  # keeps the end of the heap where it is
    del freed
    found = benchmark._peak(inputs, lambda: pieces(64)) / 2**20
    # the kernel counts resident pages per CPU and adds them up late; pieces have headers
    assert 60 <= found <= 72
    assert last.sum() == 16 * 1024
