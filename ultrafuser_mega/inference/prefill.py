"""Reading prompts: in pieces, so that answers under way never wait long, several at a time, what is known left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultrafuser_mega.inference.lanes import Lanes
from ultrafuser_mega.inference.likely import likeliest
from ultrafuser_mega.inference.mixing import Evidence, Rule
from ultrafuser_mega.inference.requests import Request
from ultrafuser_mega.inference.underway import Underway

_AT_ONCE = 16  # prompts
WORTH_WAITING = 16  # tokens that a prompt that is being read has in common with the next, which then waits for them
_LOGITS_AT_ONCE = 256  # rows over the vocabulary


class Prefill:
    """Prompts that are being read.

    Args:
        lanes: of the model.
        rule: how its specialists are mixed.
        chunk: tokens that a step reads of all prompts together, about.

    Attributes:
        rows: their requests, by id.
        asked: specialist -> tokens of the prompts that were taken.
        known: specialist -> those of them that did not have to be read.
    """

    def __init__(self, lanes: Lanes, rule: Rule, chunk: int) -> None:
        self._lanes, self._rule, self._chunk = lanes, rule, chunk
        self.rows: dict[str, Underway] = {}
        self.asked = dict.fromkeys(lanes.positions, 0)
        self.known = dict.fromkeys(lanes.positions, 0)

    def take(self, request: Request, longest: int) -> bool:
        """Begin to read a request's prompt, unless it has to wait.

        Args:
            request: the next one.
            longest: tokens that its answer may have.
        """
        whole = request.prompt_logprobs or self._rule.reads_text
        if len(self.rows) >= _AT_ONCE or (not whole and self._soon_known(request)):
            return False
        sequences = self._lanes.open(request.prompt, longest - 1, share=not whole)
        if sequences is None:
            return False
        for name, held in sequences.items():
            self.asked[name] += len(held.ids)
            self.known[name] += held.read
        row = Underway(request, sequences, longest)
        if request.prompt_logprobs:
            row.prompt.append(None)
        self.rows[request.id] = row
        return True

    def _soon_known(self, request: Request) -> bool:
        for row in self.rows.values():
            for name, ids in request.prompt.items():
                common = common_length(ids[:-1], row.request.prompt[name])
                if common >= WORTH_WAITING and common - len(self._lanes.pools[name].slots.known(ids)) >= WORTH_WAITING:
                    return True
        return False

    def step(self) -> list[Underway]:
        """Read the next piece; returns the requests whose prompts are read, which are no longer among ``rows``."""
        if not self.rows:
            return []
        rows = list(self.rows.values())
        most = max(1, self._chunk // len(rows))
        readers = {name: [row for row in rows if row.sequences[name].left] for name in self._lanes.positions}
        spans = {
            name: [(row.sequences[name], min(most, row.sequences[name].left)) for row in own]
            for name, own in readers.items()
        }
        read: dict[Underway, dict[str, Tensor]] = {row: {} for row in rows}
        for name, part in self._lanes.read(spans).items():
            for row, states, (held, count) in zip(readers[name], part, spans[name], strict=True):
                read[row][name] = states[-count:]
                if not held.left:
                    row.states[name] = states[-1:]
                if self._rule.reads_text:
                    self._add_likelihood(row, name, states[-count:])
        for row in rows:
            if row.request.prompt_logprobs:
                self._add_prompt(row, read[row])
        ready = [row for row in rows if not any(held.left for held in row.sequences.values())]
        for row in ready:
            del self.rows[row.request.id]
            row.end = self._end(row)
            if not self._rule.reads_text:
                self._lanes.keep(row.sequences)
        return ready

    def _add_likelihood(self, row: Underway, name: str, states: Tensor) -> None:
        """Of the tokens behind ``states`` (s, d_j), the last that were read."""
        held = row.sequences[name]
        targets = held.ids[held.read - len(states) + 1 : held.read + 1]
        sums = row.likelihoods.get(name, torch.zeros(1, device=self._lanes.home))
        if targets:
            sums = sums + self._lanes.likelihood(name, states[: len(targets)], targets).sum()
        row.likelihoods[name] = sums

    def _add_prompt(self, row: Underway, states: dict[str, Tensor]) -> None:
        """Log-probabilities of the tokens behind ``states``, name -> (s, d_j)."""
        held = next(iter(row.sequences.values()))
        length = len(next(iter(states.values())))
        targets = held.ids[held.read - length + 1 : held.read + 1]
        first = next(iter(states))
        for start in range(0, len(targets), _LOGITS_AT_ONCE):
            wanted = targets[start : start + _LOGITS_AT_ONCE]
            part = {name: own[start : start + len(wanted)] for name, own in states.items()}
            gate = self._lanes.gate_weights(part)
            logits = self._lanes.own_logits(part)
            scores, _ = self._rule.mix(list(logits.values()), Evidence(gate, gate, part[first].to(gate.device)))
            ids = torch.tensor(wanted, device=scores.device)
            row.prompt += likeliest(scores, ids, [row.request.top_logprobs or 0] * len(wanted))

    def _end(self, row: Underway) -> Evidence:
        gate = self._lanes.gate_weights(row.states)
        state = row.states[next(iter(self._lanes.positions))].to(gate.device)
        if not self._rule.reads_text:
            return Evidence(gate, gate, state)
        lengths = {name: len(ids) for name, ids in row.request.prompt.items()}
        means = [row.likelihoods[name] / max(length - 1, 1) for name, length in lengths.items()]
        shortest = torch.tensor([min(lengths.values())], device=gate.device)
        return Evidence(gate, gate, state, torch.stack(means, dim=1), shortest, torch.zeros_like(gate))


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
