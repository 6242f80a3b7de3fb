"""Token by token: every step runs all specialists, mixes their logits (paper, equation 1) and appends one token.

Specialists depend on each other only through the chosen token, so within a step each runs in its own lane: a device
of its own, or a CUDA stream of its own where they share a GPU. On the CPU the lanes follow one another, each with all
threads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.cache import buffered_cache
from ultrafuser_mega.inference.sampling import Chooser, Sampling
from ultrafuser_mega.release.modeling_ultrafuser import FusedCache, UltraFuserForCausalLM

Prompt = Mapping[str, Sequence[int]]  # specialist -> its ids

_ROOM_STEP = 64  # a conversation's next turn often fits into what rounding up left


@dataclass(frozen=True)
class Step:
    """What one step gave.

    Attributes:
        rows: numbers of the rows that took part, in the order of the batch's prompts.
        tokens: (len(rows),) the token that each got.
        weights: (len(rows), n) float32 gate weights behind the choice, on the CPU.
    """

    rows: list[int]
    tokens: list[int]
    weights: Tensor


@dataclass(frozen=True)
class _Past:
    """A cache, and the ids that it holds of each specialist."""

    cache: FusedCache
    ids: dict[str, list[int]]


class Lane:
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


class Decoder:
    """Decodes with one model, whose specialists are on their devices already.

    It remembers the last conversation: where the next single prompt begins with the same tokens, as the next turn of a
    chat does, only what is new is computed.
    """

    def __init__(self, model: UltraFuserForCausalLM) -> None:
        self.model = model.eval()
        self._lanes = {name: Lane(next(model.specialists[name].parameters()).device) for name in model.names}
        self._home = next(model.gate.parameters()).device
        config = model.config
        self._positions = {name: config.specialist_config(name).max_position_embeddings for name in model.names}
        self._past: _Past | None = None

    def decode(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        eos: Collection[int],
        first_row: int = 0,
    ) -> Decoding:
        """Begin answering a batch of prompts; iterate over what this returns.

        Args:
            prompts: b prompts, each with at least one id per specialist; lengths may differ in every way.
            max_new_tokens: longest answer in tokens; a row's is shortened where a specialist's positions end.
            sampling: how tokens are chosen.
            eos: tokens that end a row; the row's last step still shows it.
            first_row: number of the first row (see ``Sampling.seed``).

        Raises:
            InputError: a prompt leaves no room for an answer.
        """
        longest = {first_row + i: min(max_new_tokens, self.room(prompt)) for i, prompt in enumerate(prompts)}
        past = self._take_past(prompts, max(longest.values()))
        return Decoding(self, prompts, past, longest, Chooser(sampling, list(longest)), frozenset(eos))

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer may have before a specialist's positions end; InputError where there is none."""
        left = []
        for name, positions in self._positions.items():
            length = len(prompt[name])
            if length >= positions:
                raise InputError(f"the prompt has {length} tokens for {name}, which reads {positions} at most")
            left.append(positions - length)
        return min(left)

    def _take_past(self, prompts: Sequence[Prompt], room: int) -> _Past:
        past, self._past = self._past, None
        if past is not None and len(prompts) == 1:
            kept = {}
            for name, held in past.ids.items():
                common = _common_length(held, prompts[0][name][:-1])  # the last one's logits are still needed
                past.cache.caches[name].crop(common - len(held))
                kept[name] = held[:common]
            return _Past(past.cache, kept)
        rooms = {}
        for name in self.model.names:
            longest = max(len(prompt[name]) for prompt in prompts) + room
            rooms[name] = -(-longest // _ROOM_STEP) * _ROOM_STEP
        return _Past(buffered_cache(self.model, rooms), {name: [] for name in rooms})

    def keep(self, past: _Past) -> None:
        """Remember a finished conversation."""
        self._past = past

    @torch.inference_mode()
    def forward(
        self, ids: Mapping[str, Tensor], masks: Mapping[str, Tensor | None], cache: FusedCache
    ) -> tuple[Tensor, Tensor]:
        """Fused logits (b, V) float32 and gate weights (b, n) float32 at the last position."""
        model, hidden, logits = self.model, {}, {}
        for name, lane in self._lanes.items():
            with lane.entered():
                own, mask = ids[name].to(lane.device, non_blocking=True), masks[name]
                mask = None if mask is None else mask.to(lane.device, non_blocking=True)
                hidden[name] = model.last_hidden(name, own, mask, cache.caches[name])[:, -1:]
                logits[name] = model.own_logits(name, hidden[name])
        for lane in self._lanes.values():
            lane.join()
        weights = model.gate_weights({name: h.to(self._home) for name, h in hidden.items()})
        return model.mixture(logits.values(), weights)[:, 0], weights[:, 0]


class Decoding:
    """A batch under way: an iterator of :class:`Step`. Rows leave it at EOS, by ``end_row``, or at full length.

    Attributes:
        longest: row -> tokens of its longest possible answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Prompt],
        past: _Past,
        longest: dict[int, int],
        chooser: Chooser,
        eos: frozenset[int],
    ) -> None:
        self.longest = longest
        self._decoder, self._past, self._chooser, self._eos = decoder, past, chooser, eos
        self._rows = list(longest)
        self._prompt = prompts[0]
        self._single = len(prompts) == 1
        self._steps = 0
        self._ended: set[int] = set()
        self._next: dict[str, Tensor] = {}  # ids that the caches lack
        self._masks: dict[str, Tensor | None] = {}
        for name, held in past.ids.items():
            new = [list(prompt[name])[len(held) :] for prompt in prompts]
            self._next[name], self._masks[name] = _left_padded(new)
        first = decoder.model.names[0]
        self._seen, _ = _left_padded([prompt[first] for prompt in prompts])

    def end_row(self, row: int) -> None:
        """This row needs no more tokens (a stop string was found)."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[Step]:
        try:
            while self._rows:
                yield self._step()
                self._drop_ended()
        finally:
            if self._single and (held := self._held()) is not None:
                self._decoder.keep(_Past(self._past.cache, held))

    def _step(self) -> Step:
        logits, weights = self._decoder.forward(self._next, self._masks, self._past.cache)
        chosen = self._chooser.choose(logits, self._seen.to(logits.device), self._rows)
        self._steps += 1
        self._seen = torch.cat([self._seen, chosen[:, None]], dim=1)
        for name, mask in self._masks.items():
            self._next[name] = chosen[:, None]
            self._masks[name] = None if mask is None else torch.cat([mask, mask.new_ones(len(chosen), 1)], dim=1)
        step = Step(list(self._rows), chosen.tolist(), weights.float().cpu())
        for row, token in zip(step.rows, step.tokens, strict=True):
            if token in self._eos or self._steps == self.longest[row]:
                self._ended.add(row)
        return step

    def _drop_ended(self) -> None:
        kept = [place for place, row in enumerate(self._rows) if row not in self._ended]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in kept]
        if not kept:
            return
        index = torch.tensor(kept)
        self._seen = self._seen[index]
        self._past.cache.batch_select_indices(index)
        for name, mask in self._masks.items():
            self._next[name] = self._next[name][index]
            self._masks[name] = None if mask is None else mask[index]

    def _held(self) -> dict[str, list[int]] | None:
        """What the caches hold of each specialist's only row; None where a step was interrupted half-way."""
        answer = self._seen[0, len(self._prompt[self._decoder.model.names[0]]) :].tolist()
        held = {}
        for name, cache in self._past.cache.caches.items():
            layers: list[Any] = cache.layers
            lengths = {layer.get_seq_length() for layer in layers}
            if len(lengths) > 1:
                return None
            held[name] = [*self._prompt[name], *answer][: lengths.pop()]
        return held


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Ids (b, s), padded with each row's own first id, and their mask (b, s); no mask where nothing is padded."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = torch.tensor([[row[0]] * gap + list(row) for gap, row in zip(gaps, rows, strict=True)])
    if not any(gaps):
        return ids, None
    return ids, torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
