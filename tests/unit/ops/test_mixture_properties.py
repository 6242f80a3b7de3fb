"""What must hold for any input: symmetries of the mixture and independence of how the work is split."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixture_cases import Case, answer_of, make_case, relative_error

from ultrafuser_mega.ops import mixture_cross_entropy
from ultrafuser_mega.ops.epilogue_cpu import CpuEpilogue
from ultrafuser_mega.ops.statistics import combine

cases = st.builds(
    lambda seed, rows, vocab, widths, scale, eps, reduction: make_case(
        seed,
        rows=rows,
        vocab=vocab,
        widths=tuple(widths),
        dtype=torch.float64,
        logit_scale=scale,
        label_smoothing=eps,
        reduction=reduction,
    ),
    st.integers(0, 2**31),
    st.integers(0, 20),
    st.integers(1, 60),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([0.1, 3.0, 100.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(["sum", "none"]),
)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def assert_same(first: Any, second: Any, tolerance: Any = 1e-11) -> None:
    assert relative_error(first.loss, second.loss) <= tolerance
    for name, gradient in first.gradients().items():
        scale = float(second.gradients()[name].norm()) + 1e-6  # a gradient may cancel to nothing
        assert float((gradient - second.gradients()[name]).norm()) <= tolerance * scale * 10, name


@quick
@given(cases, st.randoms(use_true_random=False))
def test_the_order_of_the_specialists_does_not_matter(case: Any, random: Any) -> None:
    order = list(range(len(case.hidden)))
    random.shuffle(order)
    shuffled = Case(
        [case.hidden[j] for j in order],
        [case.heads[j] for j in order],
        case.gate_logits[:, order],
        case.target,
        case.options,
    )
    straight, permuted = answer_of(mixture_cross_entropy, case), answer_of(mixture_cross_entropy, shuffled)
    back = [order.index(j) for j in range(len(order))]
    restored = type(permuted)(
        permuted.loss,
        permuted.gate[:, back],
        [permuted.hidden[k] for k in back],
        [permuted.heads[k] for k in back],
    )
    assert_same(restored, straight)


@quick
@given(cases, st.floats(-50, 50))
def test_adding_a_number_to_all_gate_logits_of_a_row_changes_nothing(case: Any, shift: Any) -> None:
    moved = Case(case.hidden, case.heads, case.gate_logits + shift, case.target, case.options)
    assert_same(answer_of(mixture_cross_entropy, moved), answer_of(mixture_cross_entropy, case), 1e-9)


@quick
@given(cases, st.integers(0, 20))
def test_splitting_the_rows_over_two_calls_changes_nothing(case: Any, cut: Any) -> None:
    case = case.with_options(reduction="none")
    whole = answer_of(mixture_cross_entropy, case)
    pieces = [slice(0, cut), slice(cut, None)]
    losses = [
        mixture_cross_entropy(
            [states[rows] for states in case.hidden],
            case.heads,
            case.gate_logits[rows],
            case.target[rows],
            **case.options,
        )
        for rows in pieces
    ]
    assert relative_error(torch.cat(losses), whole.loss) <= 1e-12


@quick
@given(
    st.integers(0, 2**31),
    st.integers(1, 60),
    st.lists(st.integers(0, 60), min_size=0, max_size=7),
    st.sampled_from([0.0, 1e6]),
)
def test_statistics_of_any_split_of_the_vocabulary_combine_to_those_of_the_whole(
    seed: int, vocab: Any, cuts: Any, offset: Any
) -> None:
    """1 to 8 shards, empty ones among them."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocab, generator=draw, dtype=torch.float64) * 10 + offset
    target = torch.randint(0, vocab, (5,), generator=draw)
    epilogue = CpuEpilogue(torch.float64)
    edges = [0, *sorted(min(cut, vocab) for cut in cuts), vocab]
    shards, columns = [], []
    specialists = torch.stack((logits, logits.flip(1), torch.randn(5, vocab, generator=draw, dtype=torch.float64)))
    weights = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(5, 3)  # z is `logits`
    for start, stop in itertools.pairwise(edges):
        here = (target >= start) & (target < stop)
        local = torch.where(here, target - start, -1)
        shards.append(epilogue.mixture_statistics(specialists[:, :, start:stop].contiguous(), weights, local))
        columns.append(float(stop - start))
    combined = combine(torch.stack(shards), torch.tensor(columns, dtype=torch.float64)[:, None])
    torch.testing.assert_close(
        combined, epilogue.mixture_statistics(specialists, weights, target), rtol=1e-9, atol=1e-6
    )
    softmax_alone, _ = epilogue.statistics(logits, target, keep=False)
    torch.testing.assert_close(combined[:, :4], softmax_alone, rtol=1e-9, atol=1e-8)
