"""Packed attention against each sequence alone, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ultrafuser_mega.data.packing import PackedTokens, positions_of, starts_of
from ultrafuser_mega.models.attention import SequenceInfo, attend, rotary_frequencies
from ultrafuser_mega.models.elementwise import rotated_heads

LENGTHS = (5, 1, 7, 3)
HEADS, GROUPS, E, THETA = 4, 2, 16, 1e4


def info(dtype: torch.dtype = torch.float32) -> SequenceInfo:
    total = sum(LENGTHS)
    tokens = PackedTokens(
        torch.zeros(1, total, dtype=torch.int64),
        torch.from_numpy(positions_of(LENGTHS)),
        torch.from_numpy(starts_of(LENGTHS)),
        LENGTHS,
    )
    return SequenceInfo.of(tokens, rotary_frequencies(E, THETA, None), dtype)


def qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(sum(LENGTHS), heads, E, generator=draw) for heads in (HEADS, GROUPS, GROUPS))  # type: ignore[return-value]


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (s, heads | groups, e) float64 -> (s, heads * e)
    """Equation by equation: rotation as complex numbers, scores, causal softmax, one head after the other."""
    s = q.shape[0]
    position = torch.arange(s, dtype=torch.float64)
    angle = position[:, None] / THETA ** (torch.arange(0, E, 2, dtype=torch.float64) / E)

    def turn(x: Tensor) -> Tensor:
        turned = torch.complex(x[:, : E // 2], x[:, E // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=1)

    heads = []
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        scores = turn(q[:, head]) @ turn(k[:, group]).t() / math.sqrt(E)
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(dim=1) @ v[:, group])
    return torch.cat(heads, dim=1)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(T, heads * e) from what a fused projection of these makes."""
    each, sequences = HEADS // GROUPS, info(q.dtype)
    groups = [torch.cat([q[:, g * each : (g + 1) * each], k[:, g, None], v[:, g, None]], 1) for g in range(GROUPS)]
    mixed = torch.cat(groups, 1).flatten(1)
    return attend(*rotated_heads(mixed, sequences.cos, sequences.sin, GROUPS), sequences)


def test_every_sequence_comes_out_as_if_it_were_alone_and_so_do_its_gradients() -> None:
    ours = [x.requires_grad_() for x in qkv()]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    out = attended(*ours)
    expected = torch.cat([alone(*parts) for parts in zip(*(x.split(LENGTHS) for x in theirs), strict=True)])
    assert out.shape == (sum(LENGTHS), HEADS * E)
    # sums of at most 16 products and 7 terms of size about 1 in float32, roundings 2^-24 each
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_what_stands_in_one_sequence_never_reaches_another(changed: int) -> None:
    before = attended(*qkv())
    after_qkv = [x.clone() for x in qkv()]
    starts = starts_of(LENGTHS)
    for x in after_qkv:
        x[starts[changed] : starts[changed + 1]] += 1.0
    after = attended(*after_qkv)
    same = (before == after).all(dim=1)
    inside = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    inside[starts[changed] : starts[changed + 1]] = True
    assert torch.equal(same, ~inside)
