"""The benchmark's own bookkeeping, on a shape too small to mean anything."""

from __future__ import annotations

import torch

from ultrafuser_mega.ops import benchmark
from ultrafuser_mega.ops.benchmark import FLOOR, TASKS, Inputs, Shape

SHAPE = Shape(16, 40, (8, 4), torch.float32)


def test_every_variant_takes_part_in_every_round_beside_the_floor():
    inputs = Inputs(SHAPE, torch.device("cpu"))
    losses = {"chunked": benchmark.ours("chunked"), "plain PyTorch": benchmark.plain()}
    for task in TASKS:
        results = benchmark.measure(inputs, task, losses, repeats=3)
        assert [result.variant for result in results] == [FLOOR, *losses]
        assert all(len(result.seconds) == 3 and result.median > 0 for result in results)


def test_all_variants_compute_the_same_loss():
    inputs = Inputs(SHAPE, torch.device("cpu"))
    inputs.require((True, False, False))
    values = [benchmark.ours(name)(inputs) for name in ("chunked", "gate_only")] + [benchmark.plain()(inputs)]
    torch.testing.assert_close(torch.stack(values), values[0].expand(3), rtol=1e-5, atol=1e-5)


def test_a_variant_that_fails_is_left_out_with_its_reason():
    def broken(_inputs):
        raise RuntimeError("out of memory\nwith details")

    failed: dict[str, str] = {}
    results = benchmark.measure(Inputs(SHAPE, torch.device("cpu")), "train", {"broken": broken}, 1, failed)
    assert [result.variant for result in results] == [FLOOR]
    assert failed == {"train: broken": "out of memory"}


def test_a_variant_that_computes_something_else_is_not_timed():
    failed: dict[str, str] = {}
    losses = {"half": lambda inputs: benchmark.plain()(inputs) / 2, "chunked": benchmark.ours("chunked")}
    results = benchmark.measure(Inputs(SHAPE, torch.device("cpu")), "train", losses, 1, failed)
    assert [result.variant for result in results] == [FLOOR, "chunked"]
    assert failed["train: half"].startswith("gives a loss of ")


def test_gradient_bytes_count_what_the_task_trains():
    inputs = Inputs(SHAPE, torch.device("cpu"))
    gate, hidden, heads = 16 * 2 * 4, 16 * (8 + 4) * 4, 40 * (8 + 4) * 4
    assert inputs.require(TASKS["gate_only"][0]) == gate
    assert inputs.require(TASKS["train"][0]) == gate + hidden + heads
