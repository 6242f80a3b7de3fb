"""The streaming backend through Triton's interpreter: small splits and a small workspace, so that there are several
blocks of rows and of columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixture_cases import IGNORE, Case, answer_of, make_case, rule_violations

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import mixture_cross_entropy

EVERYTHING, GATE = (True, True, True), (True, False, False)


def streamed(
    case: Case, needs: tuple[bool, bool, bool] = EVERYTHING, workspace_bytes: int = 8 << 10, **tile: Any
) -> Any:
    from ultrafuser_mega.ops import streaming, streaming_tiles
    from ultrafuser_mega.ops.problem import checked_problem

    def loss(hidden: Any, heads: Any, gate_logits: Any, target: Any, **options: Any) -> Any:
        defaults: dict[str, Any] = {"group": None, "vocab_start": 0, "ignore_index": IGNORE, "reduction": "mean"}
        defaults |= {"label_smoothing": 0.0, "z_loss": 0.0}
        return streaming.mixture_loss(checked_problem(hidden, heads, gate_logits, target, **(defaults | options)))[0]

    with pytest.MonkeyPatch.context() as patch:
        small = {"SPLIT_COLUMNS": 256, "TILE_COLUMNS": 100, "MULTIPLE": 8, "WORKSPACE_BYTES": workspace_bytes}
        for name, value in small.items():
            patch.setattr(streaming, name, value)
        for name, entries in streaming_tiles.TILES.items():
            pointers = streaming_tiles.Tile(32, 64, 16, 4, 2, halves=name == "statistics")
            patch.setitem(entries, 80, pointers)  # for what is unaligned
            patch.setitem(entries, 90, pointers._replace(**tile))
        patch.setattr(streaming_tiles, "capability", lambda _tensor: 90)
        return answer_of(loss, case, needs)


@pytest.mark.parametrize("needs", [EVERYTHING, GATE], ids=["everything", "gate only"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_stays_within_the_rule_of_plain_pytorch(dtype: Any, reduction: str, needs: Any, interpreted: Any) -> None:
    case = make_case(
        71,
        rows=20,
        vocab=333,
        widths=(16, 24, 5),
        dtype=dtype,
        padding=3,
        reduction=reduction,
        label_smoothing=0.1,
        z_loss=1e-3,
    )
    assert rule_violations(interpreted(streamed, case, needs), case, gate_alone=needs == GATE) == []


@pytest.mark.parametrize("needs", [EVERYTHING, GATE], ids=["everything", "gate only"])
@pytest.mark.parametrize(
    ("widths", "vocab", "rows", "values"),
    [
        ((8,), 300, 5, {}),
        ((16, 7), 7, 1, {}),
        ((4, 6, 8, 3, 5), 40, 5, {}),
        ((8, 6), 1, 3, {}),
        ((8, 6), 40, 0, {}),
        ((8, 6), 300, 5, {"logit_scale": 1e4}),
        ((8, 6), 300, 5, {"common_offset": 1e6, "label_smoothing": 0.1}),
        ((8, 6), 40, 4, {"ignored": 2.0}),
    ],
    ids=str,
)
def test_shapes_and_values_that_break_naive_kernels(
    widths: Any, vocab: Any, rows: Any, values: Any, needs: Any, interpreted: Any
) -> None:
    case = make_case(72, rows=rows, vocab=vocab, widths=widths, **values)
    assert rule_violations(interpreted(streamed, case, needs), case, gate_alone=needs == GATE) == []


def through_descriptors(case: Case, needs: tuple[bool, bool, bool]) -> Any:
    return streamed(case, needs, tma=True)


@pytest.mark.parametrize("needs", [EVERYTHING, GATE], ids=["everything", "gate only"])
@pytest.mark.parametrize(
    ("widths", "aligned"), [((16, 24, 40), True), ((16, 24, 5), False)], ids=["aligned", "unaligned"]
)
def test_tensor_descriptors_change_no_bit(widths: Any, aligned: Any, needs: Any, interpreted: Any) -> None:
    """Rows, columns and widths that no tile divides; tensors that no descriptor can describe take the pointers."""
    case = make_case(76, rows=20, vocab=333, widths=widths, dtype=torch.bfloat16, padding=3, label_smoothing=0.1)
    assert all(t.stride(0) % 8 == 0 for t in case.heads) == aligned
    plain, described = interpreted(streamed, case, needs), interpreted(through_descriptors, case, needs)
    assert torch.equal(plain.loss, described.loss)
    for name, gradient in described.gradients().items():
        assert torch.equal(gradient, plain.gradients()[name]), name
    assert rule_violations(described, case, gate_alone=needs == GATE) == []


def whole_tiles(case: Case, needs: tuple[bool, bool, bool]) -> Any:
    return streamed(case, needs, halves=False)


def test_a_tile_looked_at_whole_or_in_halves_gives_the_same_within_the_rule(interpreted: Any) -> None:
    case = make_case(77, rows=20, vocab=333, widths=(16, 24, 5), label_smoothing=0.1, z_loss=1e-3)
    assert rule_violations(interpreted(whole_tiles, case, EVERYTHING), case) == []


@pytest.mark.parametrize("gate", [-10.0, -40.0, -100.0, -float("inf")])
@pytest.mark.parametrize("mask", [-1e4, -1e10, -1e30])
def test_a_specialist_that_masks_words_counts_as_much_as_its_gate_weight_says(
    mask: Any, gate: Any, interpreted: Any
) -> None:
    """Weights from 5e-5 down to nothing; z of the masked words from -0.5 to -5e25, or as if the mask were not there."""
    case = make_case(78, rows=6, vocab=300, widths=(6, 8, 4), label_smoothing=0.1)
    case.hidden[1][:, 0], case.heads[1][:150, 0] = 1.0, mask
    case.gate_logits[:, 1] = gate
    assert rule_violations(interpreted(streamed, case, EVERYTHING), case) == []


def test_a_mask_too_large_for_a_ratio_of_weights_is_a_mask_still(interpreted: Any) -> None:
    """-1e30 of a specialist of weight 1/2 beside one of 2e-18: in units of the smaller one it is below fp32's range."""
    case = make_case(80, rows=6, vocab=300, widths=(6, 8, 4), dtype=torch.bfloat16, ignored=0.0)
    case.hidden[0][:, 0], case.heads[0][:150, 0] = 1.0, -1e30
    case.gate_logits[:] = torch.tensor([0.0, -40.0, 0.0])
    case.target[:] = torch.arange(150, 156)  # a masked one would have an infinite loss
    assert rule_violations(interpreted(streamed, case, EVERYTHING), case) == []


def splits_of(columns: int) -> int:
    from ultrafuser_mega.ops import streaming

    return -(-columns // streaming.split_columns(columns))


def test_a_small_vocabulary_is_cut_so_that_programs_are_many_and_a_large_one_into_bounded_walks(compiling: Any) -> None:
    assert [compiling(splits_of, columns) for columns in (1, 4000, 16032, 32000, 128256)] == [1, 8, 8, 8, 32]


def in_one_workspace(case: Case, needs: tuple[bool, bool, bool]) -> Any:
    return streamed(case, needs, workspace_bytes=1 << 20)


def test_every_block_has_its_program_where_they_come_in_groups(interpreted: Any) -> None:
    """19 blocks of rows, forward and backward: a whole group of 16, and one of 3."""
    case = make_case(79, rows=600, vocab=100, widths=(4, 3))
    assert rule_violations(interpreted(in_one_workspace, case, EVERYTHING), case) == []


def test_what_an_ignored_row_holds_does_not_matter(interpreted: Any) -> None:
    case = make_case(73, rows=10, vocab=50, widths=(4, 3), reduction="sum")
    clean = interpreted(streamed, case)
    ignored = case.target == IGNORE
    for states in case.hidden:
        states[ignored] = torch.nan
    dirty = interpreted(streamed, case)
    assert torch.equal(dirty.loss, clean.loss)
    for name, gradient in dirty.gradients().items():
        assert torch.equal(gradient, clean.gradients()[name]), name


def test_the_loss_of_a_row_is_the_same_to_the_bit_in_any_batch(interpreted: Any) -> None:
    case = make_case(74, rows=150, vocab=300, widths=(16, 8), reduction="none")
    alone = Case(
        [states[130:133] for states in case.hidden],
        case.heads,
        case.gate_logits[130:133],
        case.target[130:133],
        case.options,
    )
    together = interpreted(streamed, case, (False, False, False)).loss
    assert torch.equal(interpreted(streamed, alone, (False, False, False)).loss, together[130:133])


def test_tensors_it_cannot_serve_are_refused() -> None:
    case = make_case(75, rows=4, vocab=5, widths=(3, 2))
    with pytest.raises(InputError, match=r"backend: streaming runs bf16, fp16 and fp32 on a GPU, not .*float32 on cpu"):
        mixture_cross_entropy(case.hidden, case.heads, case.gate_logits, case.target, backend="streaming")
