"""The C++ epilogue against its plain PyTorch twin, its exponential against float64."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ultrafuser_mega.ops
from ultrafuser_mega.ops import _cpu_epilogue, epilogue_cpu
from ultrafuser_mega.ops.epilogue_cpu import CpuEpilogue
from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue

BLOCK = _cpu_epilogue.BLOCK_COLUMNS


def chunk(rows: Any, columns: Any, dtype: torch.dtype, scale: Any = 4.0, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, columns + 5, generator=draw, dtype=dtype) * scale  # rows are longer than the logits
    target = torch.randint(-1, columns, (rows,), generator=draw)
    coefficients = tuple(torch.rand(3, rows, generator=draw, dtype=dtype))
    return wide[:, :columns], target, coefficients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 15, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("rows", [1, 5])
def test_statistics_and_gradient_equal_the_twins(rows: int, columns: Any, dtype: Any) -> None:
    logits, target, coefficients = chunk(rows, columns, dtype)
    mine, twins = logits.clone(), logits.clone()
    cpu, twin = CpuEpilogue(dtype), TorchEpilogue(dtype)
    statistics, scratch = cpu.statistics(mine, target, keep=True)
    assert scratch is not None
    expected, _ = twin.statistics(twins, target, keep=True)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-13, 1e-13)
    torch.testing.assert_close(statistics, expected, rtol=rtol, atol=atol)
    global_max = statistics[:, 0] + 1.5  # another rank's shard may hold the maximum
    torch.testing.assert_close(
        cpu.dlogits(mine, scratch, target, global_max, coefficients),
        twin.dlogits(twins, None, target, global_max, coefficients),
        rtol=rtol,
        atol=atol,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("specialists", [1, 2, 5])
def test_mixture_statistics_equal_the_twins(specialists: int, columns: Any, dtype: Any) -> None:
    rows = 4
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(specialists, rows, columns + 5, generator=draw, dtype=dtype)[:, :, :columns] * 4
    weights = torch.softmax(torch.randn(rows, specialists, generator=draw, dtype=dtype), 1)
    target = torch.randint(-1, columns, (rows,), generator=draw)
    mine = CpuEpilogue(dtype).mixture_statistics(logits, weights, target)
    twins = TorchEpilogue(dtype).mixture_statistics(logits, weights, target)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12  # plain sums over 3000 deviations of size 4 cancel
    torch.testing.assert_close(mine, twins, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [0, 1, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("specialists", [1, 2, 5])
def test_mixture_gradients_equal_the_twins(specialists: int, columns: Any, dtype: Any) -> None:
    rows = 4
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(specialists, rows, columns + 5, generator=draw, dtype=dtype)[:, :, :columns] * 4
    weights = torch.softmax(torch.randn(rows, specialists, generator=draw, dtype=dtype), 1)
    target = torch.randint(-1, max(columns, 1), (rows,), generator=draw)
    coefficients = torch.rand(3, rows, generator=draw, dtype=dtype)
    coefficients[:, 1] = 0.0  # a row that counts nothing
    logits[:, 1] = math.nan
    given: Any = (weights, target, torch.full((rows,), 20.0, dtype=dtype), tuple(coefficients))
    mine = CpuEpilogue(dtype).mixture_dlogits(logits.clone(), *given)
    twins = TorchEpilogue(dtype).mixture_dlogits(logits.clone(), *given)
    assert torch.count_nonzero(mine[:, 1]) == 0
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-13, 1e-13)
    torch.testing.assert_close(mine, twins, rtol=rtol, atol=atol)


@pytest.mark.parametrize("epilogue", [CpuEpilogue, TorchEpilogue])
def test_a_mixtures_exponentials_add_up_to_the_sum_of_its_statistics_at_any_offset(epilogue: Any) -> None:
    """A last bit of a logit of 1e6 is 6 % of a probability: both calls form the same bits of it."""
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 5, 2 * BLOCK + 3, generator=draw) + 1e6
    weights = torch.softmax(torch.randn(5, 3, generator=draw), 1)
    target = torch.full((5,), -1)
    statistics = epilogue(torch.float32).mixture_statistics(logits, weights, target)
    one, zero = torch.ones(5), torch.zeros(5)
    planes = epilogue(torch.float32).mixture_dlogits(logits, weights, target, statistics[:, 0], (one, zero, zero))
    torch.testing.assert_close(planes.sum((0, 2)), statistics[:, 1], rtol=1e-5, atol=0.0)


def test_looking_leaves_the_logits_alone_and_sees_the_same() -> None:
    logits, target, _ = chunk(7, 2 * BLOCK + 3, torch.float32)
    looked_at = logits.clone()
    looked, scratch = CpuEpilogue(torch.float32).statistics(looked_at, target, keep=False)
    kept, _ = CpuEpilogue(torch.float32).statistics(logits.clone(), target, keep=True)
    assert scratch is None and torch.equal(looked_at, logits) and torch.equal(looked, kept)


def test_an_empty_shard_is_the_identity_of_the_combination() -> None:
    statistics, _ = CpuEpilogue(torch.float32).statistics(torch.empty(2, 0), torch.tensor([-1, -1]), keep=True)
    assert statistics.tolist() == [[-math.inf, 0.0, -math.inf, 0.0]] * 2


def test_blocks_of_minus_infinity_contribute_nothing() -> None:
    logits, target, (a, b, c) = chunk(3, 2 * BLOCK, torch.float32)
    logits[:, :BLOCK] = -math.inf
    target[:] = BLOCK + 1
    cpu = CpuEpilogue(torch.float32)
    statistics, scratch = cpu.statistics(logits, target, keep=True)
    assert scratch is not None
    assert torch.isfinite(statistics[:, :3]).all()
    gradient = cpu.dlogits(logits, scratch, target, statistics[:, 0], (a, b, torch.zeros_like(c)))
    assert torch.count_nonzero(gradient[:, :BLOCK]) == 0 and torch.isfinite(gradient).all()


def test_a_row_without_weight_becomes_exactly_zero_even_from_nan() -> None:
    logits, target, _ = chunk(2, 40, torch.float32)
    logits[0] = math.nan
    zero = torch.zeros(2)
    cpu = CpuEpilogue(torch.float32)
    statistics, scratch = cpu.statistics(logits, target, keep=True)
    assert scratch is not None
    assert torch.count_nonzero(cpu.dlogits(logits, scratch, target, statistics[:, 0], (zero, zero, zero))) == 0


def test_nan_is_not_swallowed() -> None:
    logits, target, _ = chunk(1, 40, torch.float32)
    logits[0, 17] = math.nan
    statistics, _ = CpuEpilogue(torch.float32).statistics(logits, target, keep=False)
    assert math.isnan(statistics[0, 1])


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    logits, target, coefficients = chunk(64, 2 * BLOCK, torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            mine = logits.clone()
            statistics, scratch = CpuEpilogue(torch.float32).statistics(mine, target, keep=True)
            assert scratch is not None
            CpuEpilogue(torch.float32).dlogits(mine, scratch, target, statistics[:, 0], coefficients)
            results.append((statistics, mine))
    finally:
        torch.set_num_threads(threads)
    for statistics, gradient in results[1:]:
        assert torch.equal(statistics, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="this PyTorch has another OpenMP runtime")
def test_the_sweeps_run_on_the_threads_that_pytorch_has_already() -> None:
    logits, target, _ = chunk(512, 2 * BLOCK, torch.float32)
    cpu, threads = CpuEpilogue(torch.float32), torch.get_num_threads()
    tasks, done = Path("/proc/self/task"), threading.Event()
    seen: set[Path] = set()

    def watch() -> None:
        while not done.is_set():
            seen.update(tasks.iterdir())

    watcher = threading.Thread(target=watch)
    try:
        torch.set_num_threads(3)
        cpu.statistics(logits, target, keep=False)  # the team of three, if it was not there
        watcher.start()
        before = set(tasks.iterdir())
        for _ in range(100):
            cpu.statistics(logits, target, keep=False)
    finally:
        done.set()
        torch.set_num_threads(threads)
    watcher.join()
    assert seen and seen <= before


def test_the_exponential_is_within_two_ulp_down_to_the_smallest_normal_number() -> None:
    """2 ulp (1 ulp <= 2^-23 relative) without fused multiply-add as well; below 2^-126 it is 0 or exact enough."""
    x = torch.cat((-torch.linspace(0, 87.33, 1 << 20), torch.tensor([-0.0, -87.4, -104.0, -1e30, -math.inf])))
    y = torch.empty_like(x)
    _cpu_epilogue.exp_nonpositive_f32(x.data_ptr(), y.data_ptr(), x.numel())
    true = x.double().exp()
    normal = x > -87.33
    assert float(((y - true).abs() / true)[normal].max()) <= 2 * 2**-23
    assert y[-5:].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_missing_extension_is_reported_in_one_line_that_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ultrafuser_mega.ops, "_cpu_epilogue")
    monkeypatch.setitem(sys.modules, "ultrafuser_mega.ops._cpu_epilogue", None)
    spec = importlib.util.spec_from_file_location("without_extension", epilogue_cpu.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"C\+\+ extension is not built; run `pip install .`") as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "\n" not in str(caught.value)
