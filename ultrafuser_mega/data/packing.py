"""Packing by tokens: which samples share a microbatch, and how they lie in it.

A microbatch is one row of tokens: whole samples end to end, no padding between them. Attention stays within a sample
and its positions restart at 0, so a packed sample computes what it computes alone. One assignment serves all
specialists, although their prompts differ in length: samples are weighed by their longest sequence.

``spread`` places a global batch in two steps, both greedy, longest first into the lightest place (Graham's LPT rule,
at most 4/3 of the best possible): over the data-parallel replicas, then within a replica over as few microbatches as
hold ``microbatch_tokens`` each. Any number of replicas does. Which samples a step takes is not decided here.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from torch import Tensor

from ultrafuser_mega.errors import InputError


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Sequences of one specialist, end to end.

    ids        (1, T) int64
    positions  (T,) int64      0 .. length - 1 within each sequence
    starts     (k + 1,) int64  where each sequence begins; the last is T
    lengths    the k lengths, on the host; they sum to T
    """

    ids: Tensor
    positions: Tensor
    starts: Tensor
    lengths: tuple[int, ...]


def spread(lengths: Sequence[int] | np.ndarray, replicas: int, microbatch_tokens: int) -> list[list[list[int]]]:
    """Place a global batch: result[replica][microbatch] lists positions of the batch, each exactly once.

    Args:
        lengths: the longest sequence of each sample over the specialists, in tokens.
        replicas: of the model; those beyond the number of samples get none.
        microbatch_tokens: most tokens of a microbatch.

    Returns:
        Per replica its microbatches, the fullest first, so that memory runs out in the first or never.

    Raises:
        InputError: a sample is longer than ``microbatch_tokens``.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > microbatch_tokens:
        raise InputError(
            f"microbatch_tokens: {microbatch_tokens} cannot hold a sample of {sizes.max()} tokens; "
            "make it at least data.max_length"
        )
    shares = _balanced(sizes, np.arange(sizes.size), replicas)
    return [_fewest_microbatches(sizes, np.array(share, dtype=np.int64), microbatch_tokens) for share in shares]


def _fewest_microbatches(sizes: np.ndarray, share: np.ndarray, microbatch_tokens: int) -> list[list[int]]:
    count = -(-int(sizes[share].sum()) // microbatch_tokens)
    while True:  # one sample in each holds, so this ends
        bins = _balanced(sizes, share, count)
        loads = [int(sizes[bin].sum()) for bin in bins]
        if max(loads, default=0) <= microbatch_tokens:
            return [bins[place] for place in np.argsort(-np.array(loads), kind="stable")]
        count += 1


def _balanced(sizes: np.ndarray, members: np.ndarray, count: int) -> list[list[int]]:
    """``members`` over ``count`` bins of nearly the same load, ascending in each; ties go to the first bin."""
    bins: list[list[int]] = [[] for _ in range(count)]
    lightest = [(0, place) for place in range(count)]
    for member in members[np.argsort(-sizes[members], kind="stable")]:
        load, place = heapq.heappop(lightest)
        bins[place].append(int(member))
        heapq.heappush(lightest, (load + int(sizes[member]), place))
    return [sorted(bin) for bin in bins]


def padded_lengths(lengths: Sequence[int], multiple: int) -> tuple[int, ...]:
    """``lengths``, and one more sequence of padding where they do not sum to a multiple of ``multiple``."""
    padding = -sum(lengths) % multiple
    return (*lengths, padding) if padding else tuple(lengths)


def starts_of(lengths: Sequence[int]) -> np.ndarray:
    """(k + 1,) int64: where sequences of these lengths begin, and where the last ends."""
    return np.fromiter(accumulate(lengths, initial=0), dtype=np.int64, count=len(lengths) + 1)


def positions_of(lengths: Sequence[int]) -> np.ndarray:
    """(sum,) int64: positions within each of sequences of these lengths."""
    return np.arange(sum(lengths), dtype=np.int64) - np.repeat(starts_of(lengths)[:-1], lengths)
