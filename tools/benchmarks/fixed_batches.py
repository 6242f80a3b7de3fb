"""How answers were computed before requests could enter a running batch: to compare, no part of the package.

A batch of prompts is padded on the left and answered until its last row has ended; rows that end leave it. Keys and
values are in buffers with room for the longest row, so a step moves nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ultrafuser_mega.inference.requests import Prompt


class _Buffered(DynamicLayer):
    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            b, heads, _, e = key_states.shape
            self._buffers = [key_states.new_empty((b, heads, self._room, e)) for _ in range(2)]
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        stop = self.get_seq_length()
        self._buffers = [buffer.index_select(0, indices) for buffer in self._buffers]
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self._buffers)


@torch.inference_mode()
def answer_batch(
    model: Any, prompts: Sequence[Prompt], lengths: Sequence[int], eos: Collection[int]
) -> list[list[int]]:
    """Greedy answers of up to ``lengths`` tokens."""
    ids, masks, caches = {}, {}, {}
    for name in model.names:
        own = [list(prompt[name]) for prompt in prompts]
        longest = max(map(len, own))
        ids[name] = torch.tensor([[0] * (longest - len(row)) + row for row in own])
        masks[name] = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in own])
        layers = model.config.specialist_config(name).num_hidden_layers
        caches[name] = Cache(layers=[_Buffered(longest + max(lengths)) for _ in range(layers)])
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    while True:
        hidden = {n: model.last_hidden(n, ids[n], masks[n], caches[n])[:, -1] for n in model.names}
        weights = model.gate_weights(hidden)
        chosen = model.mixture((model.own_logits(n, hidden[n]) for n in model.names), weights).argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            answers[row].append(token)
        going = [at for at, row in enumerate(rows) if answers[row][-1] not in eos and len(answers[row]) < lengths[row]]
        if not going:
            return answers
        index = torch.tensor(going)
        for name in model.names:
            masks[name] = torch.cat([masks[name], masks[name].new_ones(len(rows), 1)], dim=1)
            if len(going) < len(rows):
                caches[name].batch_select_indices(index)
                masks[name] = masks[name][index]
        chosen, rows = chosen[index], [rows[at] for at in going]
        ids = dict.fromkeys(model.names, chosen[:, None])
