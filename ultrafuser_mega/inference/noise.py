"""Randomness as a function: the noise behind a draw depends on (seed, row, position) and the token, on nothing before.

Adding Gumbel noise to scores and taking the largest draws from their softmax. Because the noise of a position can be
had at any time, on any device, a token that one specialist proposes and the one that all choose are drawn with the
same: where their distributions are alike, so are, most often, the tokens.

Noise is hashed, not drawn from a generator, whose stream would differ between CPU and GPU: a token's number, mixed
once and for all, times and plus 64 bits of the position, through the finaliser of a 32 bit hash (lowbias32, Wellons
2018), in integer arithmetic that wraps around.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_BITS = 23  # of a float32's fraction, so that half a step above 0 and below 1 is exact


def draw_key(seed: int, row: int, position: int) -> int:
    """64 bits for the draw of the token at ``position`` of an answer."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {row} {position}".encode(), digest_size=8).digest(), "little")


def gumbel(keys: Sequence[int], vocabulary: int, device: torch.device) -> Tensor:  # (R, vocabulary) float32
    """Standard Gumbel noise for every token of R positions, whose ``draw_key`` is given."""
    halves = [[_signed(key | 1), _signed(key >> 32)] for key in keys]
    factor, summand = torch.tensor(halves, dtype=torch.int32, device=device).split(1, dim=1)
    tokens = _mixed(torch.arange(1, vocabulary + 1, dtype=torch.int32, device=device).mul_(0x9E3779B1 - (1 << 32)))
    bits = _mixed(tokens[None] * factor + summand).bitwise_right_shift_(32 - _BITS).bitwise_and_((1 << _BITS) - 1)
    uniform = bits.float().add_(0.5).mul_(2.0**-_BITS)
    return uniform.log_().neg_().log_().neg_()


def _mixed(x: Tensor) -> Tensor:
    """lowbias32, in place. Shifts of signed integers bring in copies of the sign, which are cut off."""
    x ^= (x >> 16) & 0xFFFF
    x *= _FIRST
    x ^= (x >> 15) & 0x1FFFF
    x *= _SECOND
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(bits: int) -> int:
    bits &= 0xFFFFFFFF
    return bits - (1 << 32) if bits >> 31 else bits
