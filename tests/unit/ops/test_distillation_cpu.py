"""The distillation's C++ epilogue against the definition of the loss in float64, from the same logits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.distillation_cases import truth_of_logits
from torch import Tensor

from ultrafuser_mega.ops.distillation_cpu import CpuEpilogue
from ultrafuser_mega.ops.distillation_epilogue import TorchEpilogue, epilogue_for
from ultrafuser_mega.ops.distillation_statistics import (
    FORWARD,
    LABEL_SUM,
    REVERSE,
    STUDENT_SUM,
    Mix,
    combine,
    row_losses,
)

BLOCK = 1024  # columns between two looks at the maxima
MIXES = [
    Mix(*shares) for shares in itertools.product((0.5, 1.0, 2.0, 4.0), (0.0, 0.3, 1.0), (0.0, 0.5, 1.0))
]  # temperature, reverse, labels
WEIGHT = [1.0, 0.25, 3.0, 0.5]


def drawn(columns: int, dtype: torch.dtype, seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Both models' logits and the labels. Rows are longer than the logits."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, rows, columns + 5, generator=draw, dtype=torch.float64) * 4
    target = torch.randint(0, max(columns, 1), (rows,), generator=draw)
    return wide[0].to(dtype)[:, :columns], wide[1].to(dtype)[:, :columns], target


def answer(known: Tensor, own: Tensor, target: Tensor, mix: Mix, cuts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """((3, C): loss, divergence, cross-entropy of each row; the gradient (C, R) of their weighted sum), from shards of
    the vocabulary that end at ``cuts``."""
    epilogue, ends = CpuEpilogue(known.dtype), [0, *cuts, known.shape[1]]
    shards = [
        (slice(a, b), torch.where((target >= a) & (target < b), target - a, -1)) for a, b in itertools.pairwise(ends)
    ]
    own = own.clone()  # its rows are not as far apart as the teacher's
    found = [epilogue.statistics(known[:, s], own[:, s], label, mix) for s, label in shards]
    statistics = found[0] if len(found) == 1 else combine(torch.stack(found), mix.temperature)
    weight = known.new_tensor(WEIGHT)
    for s, label in shards:
        epilogue.dlogits(known[:, s], own[:, s], label, statistics, weight, mix)
    return row_losses(statistics, torch.ones(len(target), dtype=torch.bool), mix), own


def compare(known: Tensor, own: Tensor, target: Tensor, mix: Mix, cuts: tuple[int, ...] = ()) -> None:
    """With y, r and D = y - r of distillation_statistics.py, a sum's terms err by their exponentials' roundings,
    (|y| + 4) ulp, and it adds up a block's in any order, for BLOCK ulp / 2 of their sum; D is at most |y| + |r|."""
    shares = (mix.temperature, mix.reverse, mix.labels)
    rows, divergence, labels, ds = truth_of_logits(known.double(), own.double(), target, *shares)
    losses, gradient = answer(known, own, target, mix, cuts)
    finite = [z[z.isfinite()] for z in (known.double(), own.double())]
    reach = max(float(z.max() - z.min()) for z in finite) * max(1.0, 1.0 / mix.temperature)
    error = torch.finfo(known.dtype).eps * (min(BLOCK, known.shape[1]) / 2 + reach + 8)
    scale = max(1.0, mix.temperature**2) * (2 * reach + 4)
    expected = torch.stack((rows, divergence, labels))
    torch.testing.assert_close(losses.double(), expected, rtol=error, atol=error * scale)
    # of a gradient q and p err by their sums and their own roundings, what stands beside q by as much as a divergence
    wanted = ds * ds.new_tensor(WEIGHT)[:, None]
    at_temperature, alone = (z.double() / mix.temperature for z in (known, own)), own.double()
    likely = torch.stack([z.softmax(1) for z in (*at_temperature, alone)]).amax(0)
    allowed = error * scale * max(WEIGHT) * likely
    allowed += 2 * torch.finfo(known.dtype).eps * wanted.abs()  # it is rounded itself
    allowed += 1e-35  # an exponential below 1e-38 is 0
    assert bool(((gradient.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 15, BLOCK - 1, BLOCK, 2 * BLOCK + 7])
def test_losses_and_gradient_are_those_of_the_definition(columns: int, dtype: torch.dtype) -> None:
    logits = drawn(columns, dtype)
    for mix in MIXES:
        compare(*logits, mix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shards_of_a_vocabulary_are_those_of_the_definition_together(dtype: torch.dtype) -> None:
    logits = drawn(333, dtype, seed=1)
    for mix in MIXES:
        compare(*logits, mix, cuts=(0, 17, 200))  # the first shard has no words


@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_a_large_common_offset_of_either_model_costs_nothing(offset: float) -> None:
    known, own, target = drawn(2 * BLOCK + 1, torch.float32, seed=2)
    for mix in MIXES:
        compare(known + offset, own, target, mix)
        compare(known, own - offset, target, mix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_words_that_are_ruled_out_count_nothing(dtype: torch.dtype) -> None:
    """By the teacher where KL(p | q) alone is asked for, by both in any case; a whole block of them, too."""
    known, own, target = drawn(2 * BLOCK + 9, dtype, seed=3)
    known[0, :BLOCK] = -torch.inf
    known[1, 10:20] = -torch.inf
    known[2, -3:] = -torch.inf
    target[:] = 2 * BLOCK + 1
    for mix in MIXES:
        if mix.reverse == 0.0:
            compare(known, own, target, mix)
            compare(known, own, target, mix, cuts=(5, BLOCK))
    own = own.masked_fill(known.isinf(), -torch.inf)
    for mix in MIXES:
        compare(known, own, target, mix)
        compare(known, own, target, mix, cuts=(5, BLOCK))


def test_a_word_that_one_of_both_rules_out_costs_1e30_and_has_a_finite_gradient() -> None:
    known, own, target = drawn(BLOCK + 9, torch.float32, seed=4)
    target[:] = 3
    for reverse, ruling in ((0.0, own), (1.0, known)):
        before = ruling[:, 100:1030].clone()
        ruling[:, 100:1030] = -torch.inf
        for cuts in ((), (BLOCK,)):
            losses, gradient = answer(known, own, target, Mix(1.0, reverse, 0.0), cuts)
            assert bool((losses[1] > 1e28).all()) and bool((losses[1] < 1e31).all())
            assert bool(gradient.isfinite().all())
        ruling[:, 100:1030] = before


def test_what_the_loss_does_not_ask_for_is_0() -> None:
    known, own, target = drawn(50, torch.float32)
    for reverse, unasked, asked in ((0.0, REVERSE, FORWARD), (1.0, FORWARD, REVERSE)):
        found = CpuEpilogue(torch.float32).statistics(known, own, target, Mix(1.0, reverse, 0.0))
        assert torch.count_nonzero(found[:, unasked]) == 0 and torch.count_nonzero(found[:, asked]) == len(found)
        assert found[:, LABEL_SUM].equal(found[:, STUDENT_SUM])


def test_a_row_without_weight_becomes_exactly_zero_whatever_it_holds() -> None:
    known, own, target = drawn(40, torch.float32)
    known[0], own[1] = math.nan, math.nan
    known[2], own[3] = -math.inf, math.inf
    epilogue = CpuEpilogue(torch.float32)
    for mix in MIXES:
        gradient = own.clone()
        statistics = epilogue.statistics(known, gradient, target, mix)
        epilogue.dlogits(known.clone(), gradient, target, statistics, torch.zeros(4), mix)
        assert torch.count_nonzero(gradient) == 0


def test_nan_is_not_swallowed_and_stays_in_its_row() -> None:
    for model, mix in itertools.product((0, 1), MIXES[::5]):
        logits = drawn(2 * BLOCK, torch.float32)
        expected, gradients = answer(*logits, mix)
        logits[model][1, 1500] = math.nan
        found, gradient = answer(*logits, mix)
        assert bool(found[1, 1].isnan())
        others = [0, 2, 3]
        assert found[:, others].equal(expected[:, others]) and gradient[others].equal(gradients[others])


def test_a_row_that_rules_out_every_word_has_no_divergence_and_leaves_others_alone() -> None:
    known, own, target = drawn(30, torch.float32)
    expected, gradients = answer(known, own, target, Mix(1.0, 0.0, 0.0))
    known[1] = -math.inf
    found, gradient = answer(known, own, target, Mix(1.0, 0.0, 0.0))
    assert bool(found[1, 1].isnan())
    others = [0, 2, 3]
    assert found[:, others].equal(expected[:, others]) and gradient[others].equal(gradients[others])


def test_an_empty_shard_is_the_identity_of_the_combination() -> None:
    nothing, inf = torch.empty(2, 0), math.inf
    found = CpuEpilogue(torch.float32).statistics(nothing, nothing, torch.tensor([-1, -1]), Mix(2.0, 0.5, 0.5))
    assert found.tolist() == [[-inf, -inf, 0.0, 0.0, 0.0, 0.0, 0.0, -inf]] * 2


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    known, own, target = drawn(2 * BLOCK + 3, torch.float32, rows=64)
    epilogue, weight, threads = CpuEpilogue(torch.float32), torch.rand(64), torch.get_num_threads()
    for mix in MIXES[::7]:
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                gradient = own.clone()
                statistics = epilogue.statistics(known, gradient, target, mix)
                epilogue.dlogits(known.clone(), gradient, target, statistics, weight, mix)
                results.append((statistics, gradient))
        finally:
            torch.set_num_threads(threads)
        for statistics, gradient in results[1:]:
            assert statistics.equal(results[0][0]) and gradient.equal(results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plain_form_gives_the_same(dtype: torch.dtype) -> None:
    """The twin that a GPU's kernels are tested against."""
    known, own, target = drawn(BLOCK + 100, dtype, seed=5)
    target[0] = -1
    weight: Any = torch.tensor(WEIGHT, dtype=dtype)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-12, 1e-13)
    for mix in MIXES:
        compiled, twin = CpuEpilogue(dtype), TorchEpilogue(dtype)
        statistics, expected = (e.statistics(known, own, target, mix) for e in (compiled, twin))
        torch.testing.assert_close(statistics, expected, rtol=rtol, atol=atol)
        mine, twins = (e.dlogits(known.clone(), own.clone(), target, expected, weight, mix) for e in (compiled, twin))
        torch.testing.assert_close(mine, twins, rtol=rtol, atol=atol)


def test_cpus_have_it_for_every_type() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        epilogue = epilogue_for(torch.device("cpu"), dtype)
        assert isinstance(epilogue, CpuEpilogue)
        assert epilogue.operand_dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
