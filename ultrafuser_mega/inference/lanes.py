"""Where specialists compute, each in its lane, and what they hold of the sequences under way.

Specialists depend on each other only through the chosen token, so within a step each runs in its own lane: a device of
its own, or a CUDA stream of its own where they share a GPU. On the CPU the lanes follow one another, each with all
threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.cache import Held, Pool
from ultrafuser_mega.inference.requests import Prompt
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

_ROWS_AT_ONCE = 256  # of logits over the whole vocabulary

Sequences = dict[str, Held]  # specialist -> what it holds of one sequence
Spans = Mapping[str, Sequence[tuple[Held, int]]]  # specialist -> sequences, each with how many tokens it reads next


def positions_of(model: UltraFuserForCausalLM) -> dict[str, int]:
    """Specialist -> the longest sequence that it reads."""
    return {name: model.config.specialist_config(name).max_position_embeddings for name in model.names}


def answer_room(prompt: Prompt, positions: Mapping[str, int]) -> int:
    """How many tokens an answer may have before a specialist's positions end; InputError where there is none."""
    left = []
    for name, longest in positions.items():
        length = len(prompt[name])
        if length >= longest:
            raise InputError(f"the prompt has {length} tokens for {name}, which reads {longest} at most")
        left.append(longest - length)
    return min(left)


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

    Args:
        model: its specialists are on their devices already.
        tokens: that every specialist's cache has room for.

    Attributes:
        positions: specialist -> the longest sequence that it reads.
        pools: specialist -> its cache.
        home: the gate's device.
    """

    def __init__(self, model: UltraFuserForCausalLM, tokens: int) -> None:
        self._model = model.eval()
        self._lanes = {name: _Lane(next(model.specialists[name].parameters()).device) for name in model.names}
        self.home: torch.device = next(model.gate.parameters()).device
        configs = {name: model.config.specialist_config(name) for name in model.names}
        self.positions = positions_of(model)
        self.pools = {
            name: Pool(configs[name].num_hidden_layers, tokens, lane.device) for name, lane in self._lanes.items()
        }

    def open(self, prompt: Prompt, more: int, *, share: bool = True) -> Sequences | None:
        """Take up a sequence, nothing of it read but what is held of its beginning; None where there is no room.

        Args:
            prompt: what it begins with.
            more: tokens that may follow.
            share: whether what other sequences have read of it counts; its last token is read in any case.
        """
        known = {name: pool.slots.known(prompt[name][:-1]) if share else [] for name, pool in self.pools.items()}
        for name, pool in self.pools.items():
            if not pool.slots.fits(known[name], len(prompt[name]) + more - len(known[name])):
                return None
        return {
            name: pool.open(prompt[name], len(prompt[name]) + more, known[name]) for name, pool in self.pools.items()
        }

    def keep(self, sequences: Sequences) -> None:
        """Let what was read of a sequence be found by others."""
        for name, held in sequences.items():
            self.pools[name].keep(held)

    def close(self, sequences: Sequences) -> None:
        """A sequence ended; its room is free for others."""
        for name, held in sequences.items():
            self.pools[name].close(held)

    @torch.inference_mode()
    def read(self, spans: Spans) -> dict[str, Tensor]:
        """Read what is next; the last hidden states there, (b, s, d_j), each on its specialist's device.

        Rows of one specialist may read different numbers of tokens; theirs are the last ones.
        """
        hidden = {}
        for name, rows in spans.items():
            if not rows:
                continue
            lane, pool = self._lanes[name], self.pools[name]
            sequences, counts = [held for held, _ in rows], [count for _, count in rows]
            with lane.entered():
                batch = pool.begin(sequences, counts)
                hidden[name] = self._model.last_hidden(name, batch.ids, batch.mask, pool.cache)
            for held, count in rows:
                held.read += count
        for name in hidden:
            self._lanes[name].join()
        return hidden

    @torch.inference_mode()
    def own_logits(self, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:  # name -> (R, d_j); (R, V) float32
        """The logits of these specialists alone, where the gate is."""
        logits = {}
        for name, part in hidden.items():
            with self._lanes[name].entered():
                logits[name] = self._model.own_logits(name, part)
        for name in logits:
            self._lanes[name].join()
        return {name: own.to(self.home) for name, own in logits.items()}

    @torch.inference_mode()
    def gate_weights(self, hidden: Mapping[str, Tensor]) -> Tensor:  # name -> (R, d_j); (R, n) float32
        """What the gate gives every specialist."""
        return self._model.gate_weights({name: part.to(self.home) for name, part in hidden.items()})

    @torch.inference_mode()
    def likelihood(self, name: str, hidden: Tensor, targets: Sequence[int]) -> Tensor:  # (R,) float32, gate's device
        """Log-likelihood of tokens under one specialist, each behind one of ``hidden`` (R, d_j)."""
        wanted = torch.tensor(targets, device=hidden.device)[:, None]
        parts = [
            self._model.own_logits(name, chunk).log_softmax(-1).gather(1, own)[:, 0]
            for chunk, own in zip(hidden.split(_ROWS_AT_ONCE), wanted.split(_ROWS_AT_ONCE), strict=True)
        ]
        return torch.cat(parts).to(self.home)
