"""Where specialists compute, and what of a batch they have read: caches, padding, and what the next batch can reuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.inference.cache import buffered_cache, joined, repeated
from ultrafuser_mega.release.modeling_ultrafuser import FusedCache, UltraFuserForCausalLM

Prompt = Mapping[str, Sequence[int]]  # specialist -> its ids

_ROOM_STEP = 64  # a conversation's next turn often fits into what rounding up left
_WORTH_SHARING = 16  # tokens that a batch's prompts have in common, below which they are computed for every row
_ROWS_AT_ONCE = 256  # of logits over the whole vocabulary


@dataclass(frozen=True)
class _Past:
    """A cache of one row, and the ids that it holds of each specialist."""

    cache: FusedCache
    ids: dict[str, list[int]]


class Rows:
    """A batch of sequences under way.

    Attributes:
        cache: what has been read.
        next: specialist -> (b, s) ids that it has not read.
        masks: specialist -> (b, read + s), 0 where a row is padded; None where no row is.
    """

    def __init__(self, past: _Past, prompts: Sequence[Prompt]) -> None:
        self.cache = past.cache
        self.next: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor | None] = {}
        for name, held in past.ids.items():
            new = [list(prompt[name])[len(held) :] for prompt in prompts]
            self.next[name] = self.padded_ids(new)
            self.masks[name] = _mask(new, len(held))

    @staticmethod
    def padded_ids(rows: Sequence[Sequence[int]]) -> Tensor:
        """(b, s), padded on the left with each row's own first id."""
        longest = max(map(len, rows))
        return torch.tensor([[row[0]] * (longest - len(row)) + list(row) for row in rows])

    def append(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """All specialists read ``ids`` (b, s) next; ``mask`` (b, s) is 0 where those pad, None: nowhere."""
        for name, held in self.masks.items():
            read = self.length(name)
            self.next[name] = ids
            if held is None and mask is None:
                continue
            before = ids.new_ones(len(ids), read) if held is None else held
            self.masks[name] = torch.cat([before, torch.ones_like(ids) if mask is None else mask], dim=1)

    def length(self, name: str) -> int:
        """Tokens of a row that specialist ``name`` has read, padding included."""
        return self.cache.caches[name].get_seq_length()

    def select(self, index: Tensor) -> None:
        """Go on with these rows; one may be there more than once."""
        self.cache.batch_select_indices(index)
        for name, mask in self.masks.items():
            self.next[name] = self.next[name][index]
            self.masks[name] = None if mask is None else mask[index]

    def padding(self, name: str) -> int:
        """Tokens at the beginning that pad every row of specialist ``name``."""
        mask = self.masks[name]
        return 0 if mask is None else int(mask.any(0).long().argmax())


class _Lane:
    """Where one specialist computes: a device, and on a GPU a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Work queued inside starts when what is queued outside is done, and runs beside what is queued later."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is queued outside from now on waits for the lane's work."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)


class Lanes:
    """All specialists of one model, each in its lane.

    Attributes:
        positions: specialist -> the longest sequence that it reads.
    """

    def __init__(self, model: UltraFuserForCausalLM) -> None:
        self._model = model.eval()
        self._lanes = {name: _Lane(next(model.specialists[name].parameters()).device) for name in model.names}
        self._home = next(model.gate.parameters()).device
        config = model.config
        self.positions = {name: config.specialist_config(name).max_position_embeddings for name in model.names}
        self._past: _Past | None = None

    def begin(self, prompts: Sequence[Prompt], room: int, *, remember: bool = True) -> Rows:
        """Take up a batch, nothing of it read yet but what is remembered of the last one.

        Args:
            prompts: of b rows.
            room: tokens that will follow each.
            remember: whether what an earlier batch has read may be left out of what is read now.
        """
        past, self._past = self._past if remember else None, None
        rooms = {}
        for name in self.positions:
            longest = max(len(prompt[name]) for prompt in prompts) + room
            rooms[name] = -(-longest // _ROOM_STEP) * _ROOM_STEP
        # The last token's logits are still needed.
        shared = {name: _common_beginning([prompt[name][:-1] for prompt in prompts]) for name in rooms}
        if len(prompts) == 1:
            if past is not None:
                return Rows(_cropped(past, shared), prompts)
        elif remember and min(map(len, shared.values())) >= _WORTH_SHARING:
            self._past = self._read(past, shared)
            return Rows(_Past(repeated(self._model, self._past.cache, len(prompts), rooms), shared), prompts)
        return Rows(_Past(buffered_cache(self._model, rooms), {name: [] for name in rooms}), prompts)

    def join(self, first: Rows, second: Rows, room: int) -> Rows:
        """Two batches, each of which has one token next, as one; what pads all rows of one at its beginning is dropped.

        Args:
            first: its rows come first.
            second: the others.
            room: tokens that will follow each row.
        """
        parts = (first, second)
        cuts = [{name: part.padding(name) for name in self.positions} for part in parts]
        lengths = {
            name: max(part.length(name) - cut[name] for part, cut in zip(parts, cuts, strict=True))
            for name in self.positions
        }
        rooms = {name: length + room for name, length in lengths.items()}
        cache = joined(self._model, [(part.cache, cut) for part, cut in zip(parts, cuts, strict=True)], lengths, rooms)
        both = Rows(_Past(cache, {}), [])
        for name, length in lengths.items():
            both.next[name] = torch.cat([part.next[name] for part in parts])
            masks = []
            for part, cut in zip(parts, cuts, strict=True):
                whole, b = part.masks[name], len(part.next[name])
                read = part.length(name)
                own = torch.ones(b, read + 1, dtype=torch.int64) if whole is None else whole
                own = own[:, cut[name] :]
                masks.append(torch.cat([own.new_zeros(b, length + 1 - own.shape[1]), own], dim=1))
            both.masks[name] = torch.cat(masks)
        return both

    def keep(self, rows: Rows, prompt: Prompt, answer: Sequence[int]) -> None:
        """Remember a conversation of one row; nothing where a step was interrupted half-way."""
        held = {}
        for name, cache in rows.cache.caches.items():
            layers: list[Any] = cache.layers
            lengths = {layer.get_seq_length() for layer in layers}
            if len(lengths) > 1:
                return
            held[name] = [*prompt[name], *answer][: lengths.pop()]
        self._past = _Past(rows.cache, held)

    @torch.inference_mode()
    def forward(self, rows: Rows) -> dict[str, Tensor]:
        """Read what is next; the last hidden states of every specialist there, (b, s, d_j), each on its device."""
        hidden = {}
        for name, lane in self._lanes.items():
            with lane.entered():
                ids, mask = rows.next[name].to(lane.device, non_blocking=True), rows.masks[name]
                mask = None if mask is None else mask.to(lane.device, non_blocking=True)
                hidden[name] = self._model.last_hidden(name, ids, mask, rows.cache.caches[name])
        for lane in self._lanes.values():
            lane.join()
        return hidden

    def own_logits(self, hidden: Mapping[str, Tensor]) -> list[Tensor]:  # name -> (R, d_j); n of (R, V) float32
        """The logits of every specialist alone, where the gate is."""
        logits = []
        for name, lane in self._lanes.items():
            with lane.entered():
                logits.append(self._model.own_logits(name, hidden[name]))
        for lane in self._lanes.values():
            lane.join()
        return [own.to(self._home) for own in logits]

    def gate_weights(self, hidden: Mapping[str, Tensor]) -> Tensor:  # name -> (R, d_j); (R, n) float32
        """What the gate gives every specialist."""
        return self._model.gate_weights({name: part.to(self._home) for name, part in hidden.items()})

    def mean_likelihood(self, hidden: Mapping[str, Tensor], rows: Rows) -> Tensor:  # (b, n) float32
        """Mean log-likelihood of a prompt's tokens but the first, under every specialist.

        Args:
            hidden: what ``forward`` gave for whole prompts, (b, s, d_j).
            rows: as they were then.
        """
        columns = []
        for name, part in hidden.items():
            ids, mask = rows.next[name].to(part.device), rows.masks[name]
            real = torch.ones_like(ids) if mask is None else mask.to(part.device)
            real = (real[:, 1:] * real[:, :-1]).flatten()
            before, target = part[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            likelihood = torch.cat(
                [
                    self._model.own_logits(name, chunk).log_softmax(-1).gather(1, wanted[:, None])[:, 0]
                    for chunk, wanted in zip(before.split(_ROWS_AT_ONCE), target.split(_ROWS_AT_ONCE), strict=True)
                ]
                or [part.new_zeros(0)]
            )
            sums = (likelihood * real).view(len(ids), -1).sum(1) / real.view(len(ids), -1).sum(1).clamp(min=1)
            columns.append(sums.to(self._home))
        return torch.stack(columns, dim=1)

    def _read(self, past: _Past | None, ids: dict[str, list[int]]) -> _Past:
        """A cache of one row that holds exactly ``ids``, read anew where ``past`` does not hold them."""
        known = past is not None and all(_common_length(past.ids[name], own) == len(own) for name, own in ids.items())
        if past is not None and known:
            return _cropped(past, ids)
        rooms = {name: -(-len(own) // _ROOM_STEP) * _ROOM_STEP for name, own in ids.items()}
        empty = _Past(buffered_cache(self._model, rooms), {name: [] for name in ids})
        rows = Rows(empty, [ids])
        self.forward(rows)
        return _Past(rows.cache, ids)


def _cropped(past: _Past, ids: Mapping[str, Sequence[int]]) -> _Past:
    """``past`` cut to what it has in common with ``ids``."""
    kept = {}
    for name, held in past.ids.items():
        common = _common_length(held, ids[name])
        past.cache.caches[name].crop(common - len(held))
        kept[name] = held[:common]
    return _Past(past.cache, kept)


def _mask(rows: Sequence[Sequence[int]], held: int) -> Tensor | None:
    """(b, held + s), 0 where ``_padded`` pads; None where nothing is padded."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    if not any(gaps):
        return None
    return torch.tensor([[1] * held + [0] * gap + [1] * (longest - gap) for gap in gaps])


def _common_beginning(rows: Sequence[Sequence[int]]) -> list[int]:
    common = list(rows[0])
    for row in rows[1:]:
        del common[_common_length(common, row) :]
    return common


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
