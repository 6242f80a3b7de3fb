"""The fused logits inside the streaming kernels, through Triton's interpreter: how exact they are, and that the same
logit has the same bits in every tile, which the backward relies on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixture_cases import IGNORE, Case, make_case
from torch import Tensor

from ultrafuser_mega.ops.problem import checked_problem
from ultrafuser_mega.ops.statistics import MAX, SUM_EXP

HALF = [torch.bfloat16, torch.float16]


def in_tiles(case: Case, capability: int, kernels: tuple[str, ...] = ("statistics", "dlogits")) -> list[Tensor]:
    """z of the case in the tile of every one of the kernels for that GPU."""
    from ultrafuser_mega.ops import streaming_tiles

    n, dtype = len(case.hidden), case.hidden[0].dtype
    return [logits(case, streaming_tiles.tile(name, capability, dtype, n)) for name in kernels]


def logits(case: Case, tile: Any, **how: bool) -> Tensor:
    from stored_tiles import stored_logits

    return stored_logits(case.hidden, case.heads, case.gate_logits, tile, **how)


def true_logits(case: Case) -> Tensor:
    """(N, V) float64."""
    weights = torch.softmax(case.gate_logits, 1).double()  # of the same fp32 weights
    heads = [head[: case.options["vocab_size"]].double() for head in case.heads]
    parts = [weights[:, j, None] * (states.double() @ heads[j].t()) for j, states in enumerate(case.hidden)]
    return torch.stack(parts).sum(0)


def logit_bound(case: Case) -> Tensor:
    """(N, V): what fp32 accumulation of exact products may lose, in any order: a rounding per term, and a handful per
    segment for weights, their ratios (a division of 2 ulp) and the multiplications by them."""
    weights = torch.softmax(case.gate_logits, 1).double()
    heads = [head[: case.options["vocab_size"]].double().abs() for head in case.heads]
    size = sum(weights[:, j, None] * (states.double().abs() @ heads[j].t()) for j, states in enumerate(case.hidden))
    terms = sum(states.shape[1] for states in case.hidden) + 6 * len(heads)
    assert isinstance(size, Tensor)
    return 2.0**-24 * terms * size


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_a_logit_has_the_same_bits_in_the_forwards_tile_and_in_the_backwards(
    dtype: Any, capability: int, interpreted: Any
) -> None:
    """Some rows have specialists that count almost nothing, beside rows of the same tile that have none."""
    case = make_case(141, rows=140, vocab=290, widths=(48, 40, 72), dtype=dtype, gate_scale=4.0)
    case.gate_logits[[3, 70, 139], [0, 1, 2]] = torch.tensor([-60.0, -100.0, -float("inf")])
    forward, backward = interpreted(in_tiles, case, capability)
    assert torch.equal(forward, backward)
    statistics = interpreted(forward_statistics, case, capability)
    kept = case.target != IGNORE  # the gate weights of the others are not theirs
    assert torch.equal(statistics[kept, MAX], backward.amax(1)[kept])
    sums = (backward - backward.amax(1, keepdim=True)).double().exp().sum(1)[kept]
    torch.testing.assert_close(statistics[kept, SUM_EXP].double(), sums, rtol=2e-6, atol=0.0)


def forward_statistics(case: Case, capability: int) -> Tensor:
    from ultrafuser_mega.ops import streaming, streaming_tiles

    problem = checked_problem(
        case.hidden, case.heads, case.gate_logits, case.target, group=None, vocab_start=0, vocab_size=None,
        ignore_index=IGNORE, reduction="sum", label_smoothing=0.0, z_loss=0.0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming_tiles, "capability", lambda _tensor: capability)
        return streaming.statistics(problem, streaming.gate_softmax(problem), per_specialist=False)


def in_blocks_of(case: Case, rows: tuple[int, ...], **how: bool) -> list[Tensor]:
    from ultrafuser_mega.ops.streaming_tiles import Tile

    return [logits(case, Tile(block, 64, 16, 4, 2), **how) for block in rows]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_specialist_that_counts_nothing_in_one_row_changes_no_bit_of_its_neighbours(
    dtype: Any, interpreted: Any
) -> None:
    case = make_case(142, rows=64, vocab=60, widths=(24, 40), dtype=dtype)
    (clean,) = interpreted(in_blocks_of, case, (64,))
    case.gate_logits[17, 1] = -200.0
    for z in interpreted(in_blocks_of, case, (16, 32, 64)):
        assert torch.equal(z[:17], clean[:17]) and torch.equal(z[18:], clean[18:])
        assert not torch.equal(z[17], clean[17])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_operands_cost_a_logit_no_more_than_fp32_accumulation_does(dtype: Any, interpreted: Any) -> None:
    case = make_case(143, rows=40, vocab=70, widths=(64, 48, 80), dtype=dtype)
    (z,) = interpreted(in_tiles, case, 90, ("dlogits",))
    error = (z.double() - true_logits(case)).abs()
    assert bool((error <= logit_bound(case)).all()), float((error / logit_bound(case)).max())


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    spread=st.sampled_from([0.5, 5.0, 20.0, 60.0, 200.0]),
    scale=st.sampled_from([1e-3, 3.0, 1e4]),
    absent=st.sampled_from([None, 0, 1, 2]),
    dtype=st.sampled_from(HALF),
    seed=st.integers(0, 1000),
)
def test_logits_stay_exact_for_any_gate_and_any_size(
    spread: float, scale: float, absent: Any, dtype: Any, seed: int, interpreted: Any
) -> None:
    """Weights down to 0, logits up to 1e4 standard deviations. What a specialist of less than 2^-64 adds is rounded."""
    case = make_case(seed, rows=16, vocab=20, widths=(16, 8, 24), dtype=dtype, gate_scale=spread, logit_scale=scale)
    if absent is not None:
        case.gate_logits[::2, absent] = -float("inf")
    (z,) = interpreted(in_blocks_of, case, (16,))
    error = (z.double() - true_logits(case)).abs()
    assert bool((error <= logit_bound(case)).all()), float((error / logit_bound(case)).max())


@pytest.mark.parametrize("mask", [-1e4, -1e10])
@pytest.mark.parametrize("gates", [(0.0, -40.0, 0.0), (0.0, 0.0, -44.0), (-44.0, 0.0, -44.0)], ids=str)
def test_a_masked_word_of_a_heavy_specialist_stays_finite_beside_a_light_one(
    mask: float, gates: Any, interpreted: Any
) -> None:
    case = make_case(144, rows=8, vocab=30, widths=(8, 16, 8), dtype=torch.bfloat16)
    case.hidden[0][:, 0], case.heads[0][:15, 0] = 1.0, mask
    case.gate_logits[:] = torch.tensor(gates)
    (z,) = interpreted(in_blocks_of, case, (32,))
    error = (z.double() - true_logits(case)).abs()
    assert bool((error <= logit_bound(case)).all())


@pytest.mark.parametrize("gate", [-10.0, -40.0, -100.0, -float("inf")])
@pytest.mark.parametrize("mask", [-1e4, -1e10, -1e30])
def test_a_light_specialist_that_masks_words_counts_as_much_as_its_gate_weight_says(
    mask: float, gate: float, interpreted: Any
) -> None:
    """As test_streaming.py has it for fp32 and whole losses, whose gradients in 16 bits show dz's rounding alone."""
    case = make_case(145, rows=8, vocab=30, widths=(8, 16, 8), dtype=torch.bfloat16)
    case.hidden[1][:, 0], case.heads[1][:15, 0] = 1.0, mask
    case.gate_logits[:, 1] = gate
    (z,) = interpreted(in_blocks_of, case, (32,))
    error = (z.double() - true_logits(case)).abs()
    assert bool((error <= logit_bound(case)).all()), float((error / logit_bound(case)).max())
