"""Samples to the tensors of one microbatch.

Every specialist gets its own token matrix (its prompts differ in length); what the loss needs is shared
and in one order for all: sample by sample, turn by turn, token by token. Row i of N is one response
token; ``rows[s][i]`` is where specialist s holds the hidden state that predicts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ultrafuser_mega.data.store import Sample

IGNORED = -100  # the target of rows that count nowhere


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """b samples; S_s is specialist s's padded length, N the number of response tokens.

    tokens[s]   (b, S_s) int64  right-padded
    rows[s]     (N,) int64      into the hidden states flattened from (S_s, b, d) to (S_s * b, d)
    targets     (N,) int64      the response tokens; IGNORED where the sample is a filler
    row_class   (N,) int64      class of the row's sample
    row_sample  (N,) int64      its place in the microbatch, 0 .. b - 1
    """

    tokens: dict[str, Tensor]
    rows: dict[str, Tensor]
    targets: Tensor
    row_class: Tensor
    row_sample: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same microbatch on ``device``."""
        return MicroBatch(
            tokens={name: ids.to(device) for name, ids in self.tokens.items()},
            rows={name: at.to(device) for name, at in self.rows.items()},
            targets=self.targets.to(device),
            row_class=self.row_class.to(device),
            row_sample=self.row_sample.to(device),
        )


def collate(
    samples: Sequence[Sample],
    class_ids: Sequence[int],
    specialists: Sequence[str],
    pad_id: int,
    pad_to_multiple: int = 1,
    fillers: int = 0,
) -> MicroBatch:
    """The microbatch of b samples for the ``specialists`` that this rank runs (at least one or none).

    Right padding under causal attention never reaches a response token, so no attention mask is needed.
    S_s is the longest sequence rounded up to ``pad_to_multiple`` (what sequence parallel needs). For a
    response token at position p of sample k, the state at p - 1 predicts it:
    rows = (p - 1) * b + k. The last ``fillers`` samples only keep the shapes: their targets are IGNORED.
    """
    responses = [sample.responses for sample in samples]
    counts = [sum(len(ids) for ids in turns) for turns in responses]
    targets = _concatenate([ids for turns in responses for ids in turns])
    if fillers:
        targets[len(targets) - sum(counts[len(samples) - fillers :]) :] = IGNORED
    tokens, rows = {}, {}
    for name in specialists:
        tokens[name], rows[name] = _lay_out(samples, name, responses, pad_id, pad_to_multiple)
    places = torch.arange(len(samples))
    repeats = torch.tensor(counts)
    return MicroBatch(
        tokens=tokens,
        rows=rows,
        targets=torch.from_numpy(targets),
        row_class=torch.tensor(class_ids, dtype=torch.int64).repeat_interleave(repeats),
        row_sample=places.repeat_interleave(repeats),
    )


def _lay_out(
    samples: Sequence[Sample], name: str, responses: Sequence[Sequence[np.ndarray]], pad_id: int, multiple: int
) -> tuple[Tensor, Tensor]:  # (b, S) int64, (N,) int64
    b = len(samples)
    longest = max(sample.length(name) for sample in samples)
    matrix = np.full((b, -(-longest // multiple) * multiple), pad_id, dtype=np.int64)
    rows = []
    for k, (sample, turns) in enumerate(zip(samples, responses, strict=True)):
        position = 0
        for prompt, response in zip(sample.prompts_of(name), turns, strict=True):
            start = position + len(prompt)
            end = start + len(response)
            matrix[k, position:start] = prompt
            matrix[k, start:end] = response
            rows.append(np.arange(start - 1, end - 1, dtype=np.int64) * b + k)
            position = end
    return torch.from_numpy(matrix), torch.from_numpy(np.concatenate(rows))


def _concatenate(pieces: Sequence[np.ndarray]) -> np.ndarray:  # (N,) int64
    return np.concatenate(pieces).astype(np.int64)
