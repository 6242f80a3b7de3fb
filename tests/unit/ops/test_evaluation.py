"""The losses of an evaluation, from one product per head, against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.mixture_cases import Case, make_case
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import cross_entropy_of_each, forward
from ultrafuser_mega.runtime.spawn import run_ranks

WIDTHS = (4, 6, 3)
VOCAB = 53
# Logits are sums of at most 7 products of size up to about 10; each rounding is 2^-24 (2^-9 of bf16 inputs is in the
# inputs, which both sides share).
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5}


def expected(case: Case) -> Tensor:  # (2 + n, N)
    weights = case.gate_logits.double().softmax(1)
    logits = [h.double() @ w.double()[:VOCAB].t() for h, w in zip(case.hidden, case.heads, strict=True)]
    mixed = sum(weights[:, j : j + 1] * z for j, z in enumerate(logits))
    assert isinstance(mixed, Tensor)
    mean = torch.stack(logits).mean(0)
    return torch.stack([F.cross_entropy(z, case.target, reduction="none") for z in (mixed, mean, *logits)])


def found(case: Case, **options: Any) -> Tensor:
    shard = {"group": None, "vocab_start": 0, "vocab_size": VOCAB} | options
    return cross_entropy_of_each(case.hidden, case.heads, case.gate_logits, case.target, **shard).double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("common_offset", [0.0, 1e3])
def test_the_mixture_the_plain_mean_and_every_specialist_alone(dtype: torch.dtype, common_offset: float) -> None:
    case = make_case(5, rows=37, vocab=VOCAB, widths=WIDTHS, dtype=dtype, padding=8, common_offset=common_offset)
    scale = max(1.0, common_offset)  # a logit's rounding is relative to the logit
    torch.testing.assert_close(found(case), expected(case), rtol=0, atol=TOLERANCE[dtype] * scale)


def test_small_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(6, rows=300, vocab=VOCAB, widths=WIDTHS, padding=8)
    monkeypatch.setitem(forward.BLOCK_COLUMNS, "cpu", 16)
    monkeypatch.setattr(forward, "HOST_BLOCK_BYTES", 128 * 3 * 16 * 4)
    torch.testing.assert_close(found(case), expected(case), rtol=0, atol=TOLERANCE[torch.float32])


def test_no_rows_give_no_losses() -> None:
    case = make_case(7, rows=0, vocab=VOCAB, widths=WIDTHS)
    assert found(case).shape == (5, 0)


def test_wrong_input_is_refused_as_by_the_loss() -> None:
    case = make_case(8, rows=3, vocab=VOCAB, widths=WIDTHS)
    with pytest.raises(InputError, match=r"gate_logits: shape \(3, 2\), needed \(3, 3\)"):
        found(replace(case, gate_logits=case.gate_logits[:, :2]))


def test_a_vocabulary_in_shards_gives_the_same_on_every_rank() -> None:
    case = make_case(9, rows=23, vocab=VOCAB, widths=WIDTHS, padding=8)
    for losses in run_ranks(_on_shard, 4):
        torch.testing.assert_close(losses, expected(case), rtol=0, atol=TOLERANCE[torch.float32])


def _on_shard(rank: int) -> Tensor:
    case = make_case(9, rows=23, vocab=VOCAB, widths=WIDTHS, padding=8)
    starts = [0, 0, 30, 50, 61]  # the first rank has no rows, the last of 11 some that are padding
    part = Case(
        case.hidden, [head[starts[rank] : starts[rank + 1]] for head in case.heads], case.gate_logits, case.target
    )
    return found(part, group=dist.group.WORLD, vocab_start=starts[rank])
