"""Samples to the tensors of one microbatch.

Every specialist gets its own packed tokens (its prompts differ in length); what the loss needs is shared
and in one order for all: sample by sample, turn by turn, token by token. Row i of N is one response
token; ``rows[s][i]`` is where specialist s holds the hidden state that predicts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ultrafuser_mega.data.packing import PackedTokens, padded_lengths, positions_of, starts_of
from ultrafuser_mega.data.store import Sample

IGNORED = -100  # the target of rows that count nowhere


class MicroBatch:
    """k samples in one row of T_s tokens per specialist s, and their N response tokens.

    tokens[s]   packed sequences of specialist s; the last may be padding
    rows[s]     (N,) int64  into the hidden states (T_s, d): the state at p - 1 predicts the token at p
    targets     (N,) int64  the response tokens; IGNORED if the microbatch is a filler
    row_class   (N,) int64  class of the row's sample; of a filler one past the last class
    row_counts  response tokens of each sample, on the host

    All of it is cut from one tensor, so that a device gets it in a single copy.
    """

    def __init__(self, flat: Tensor, lengths: Mapping[str, tuple[int, ...]], row_counts: Sequence[int]) -> None:
        self._flat, self._lengths = flat, dict(lengths)
        self.row_counts = list(row_counts)
        n = sum(self.row_counts)
        sizes = [size for parts in self._lengths.values() for size in _sizes(parts, n)]
        pieces = iter(flat.split([*sizes, n, n]))
        self.tokens: dict[str, PackedTokens] = {}
        self.rows: dict[str, Tensor] = {}
        for name, parts in self._lengths.items():
            self.tokens[name] = PackedTokens(next(pieces)[None], next(pieces), next(pieces), parts)
            self.rows[name] = next(pieces)
        self.targets, self.row_class = pieces

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``, in one copy; the host does not wait for a GPU to have it."""
        if device.type == "cpu":
            return self
        flat = self._flat.pin_memory() if device.type == "cuda" else self._flat  # if it is not yet
        return MicroBatch(flat.to(device, non_blocking=True), self._lengths, self.row_counts)

    def pinned(self) -> MicroBatch:
        """The same in pinned memory, from which a GPU copies by itself."""
        return MicroBatch(self._flat.pin_memory(), self._lengths, self.row_counts)


def _sizes(lengths: tuple[int, ...], rows: int) -> tuple[int, int, int, int]:
    """Of ids, positions, starts and rows of one specialist."""
    return sum(lengths), sum(lengths), len(lengths) + 1, rows


def collate(
    samples: Sequence[Sample],
    class_ids: Sequence[int],
    multiples: Mapping[str, int],
    pad_id: int,
    filler_class: int | None = None,
) -> MicroBatch:
    """The microbatch of some samples (at least one) for the specialists that this rank runs.

    Args:
        samples: in the order of their rows.
        class_ids: the class of each.
        multiples: specialist -> what its T must be a multiple of (sequence parallelism: tp; else 1).
        pad_id: fills up to there, as a sequence of its own.
        filler_class: None; or a filler, whose rows count nowhere and are of this class, one past the last.
    """
    responses = [sample.responses for sample in samples]
    counts = [sum(len(ids) for ids in turns) for turns in responses]
    targets = np.concatenate([ids for turns in responses for ids in turns]).astype(np.int64)
    if filler_class is not None:
        targets.fill(IGNORED)
        class_ids = [filler_class] * len(samples)
    pieces: list[np.ndarray] = []
    lengths: dict[str, tuple[int, ...]] = {}
    for name, multiple in multiples.items():
        ids, rows, lengths[name] = _lay_out(samples, name, responses, pad_id, multiple)
        pieces += [ids, positions_of(lengths[name]), starts_of(lengths[name]), rows]
    pieces += [targets, np.repeat(np.array(class_ids, dtype=np.int64), counts)]
    return MicroBatch(torch.from_numpy(np.concatenate(pieces)), lengths, counts)


def _lay_out(
    samples: Sequence[Sample], name: str, responses: Sequence[Sequence[np.ndarray]], pad_id: int, multiple: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:  # ids (T,) int64, rows (N,) int64, lengths
    lengths = padded_lengths([sample.length(name) for sample in samples], multiple)
    ids = np.full(sum(lengths), pad_id, dtype=np.int64)
    rows = []
    position = 0
    for sample, turns in zip(samples, responses, strict=True):
        for prompt, response in zip(sample.prompts_of(name), turns, strict=True):
            start = position + len(prompt)
            end = start + len(response)
            ids[position:start] = prompt
            ids[start:end] = response
            rows.append(np.arange(start - 1, end - 1, dtype=np.int64))
            position = end
    return ids, np.concatenate(rows), lengths
