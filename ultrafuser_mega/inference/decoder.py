"""Token by token: every step runs all specialists, mixes their logits by a rule and appends one token.

The rule is the gate's (paper, equation 1) or one that it is compared with (``mixing``). Specialists depend on each
other only through the chosen token, so within a step each runs in its own lane: a device of its own, or a CUDA stream
of its own where they share a GPU. On the CPU the lanes follow one another, each with all threads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.lanes import Lanes, Prompt, Rows
from ultrafuser_mega.inference.mixing import GATE, RULES, Evidence, Rule
from ultrafuser_mega.inference.sampling import Chooser, Sampling
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM


@dataclass(frozen=True)
class Step:
    """What one step gave.

    Attributes:
        rows: numbers of the rows that took part, in the order of the batch's prompts.
        tokens: (len(rows),) the token that each got.
        weights: (len(rows), n) float32 weights of the specialists behind the choice, on the CPU.
    """

    rows: list[int]
    tokens: list[int]
    weights: Tensor


class Decoder:
    """Decodes with one model, whose specialists are on their devices already.

    It remembers the last conversation, or what the last batch's prompts had in common: where the next ones begin with
    the same tokens, as the next turn of a chat or the next batch of a benchmark does, only what is new is computed.

    Args:
        model: the model.
        rule: how its specialists are mixed.
    """

    def __init__(self, model: UltraFuserForCausalLM, rule: Rule = RULES[GATE]) -> None:
        self.model, self.rule = model, rule
        self.lanes = Lanes(model)

    def decode(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        eos: Collection[int],
        first_row: int = 0,
        at_once: int | None = None,
    ) -> Decoding:
        """Begin answering prompts; iterate over what this returns.

        Args:
            prompts: each with at least one id per specialist; lengths may differ in every way.
            max_new_tokens: longest answer in tokens; a row's is shortened where a specialist's positions end.
            sampling: how tokens are chosen.
            eos: tokens that end a row; the row's last step still shows it.
            first_row: number of the first row (see ``Sampling.seed``).
            at_once: rows of the batch, in which the others take the places of rows that are done; None: all.

        Raises:
            InputError: a prompt leaves no room for an answer.
        """
        longest = {first_row + i: min(max_new_tokens, self.room(prompt)) for i, prompt in enumerate(prompts)}
        waiting = dict(zip(longest, prompts, strict=True))
        return Decoding(self, waiting, longest, Chooser(sampling, list(longest)), frozenset(eos), at_once)

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer may have before a specialist's positions end; InputError where there is none."""
        left = []
        for name, positions in self.lanes.positions.items():
            length = len(prompt[name])
            if length >= positions:
                raise InputError(f"the prompt has {length} tokens for {name}, which reads {positions} at most")
            left.append(positions - length)
        return min(left)


@dataclass
class _Batch:
    """Rows under way.

    Attributes:
        rows: their numbers.
        held: what has been read of them.
        seen: (b, s) ids of the first specialist's prompt and of the answer, padded on the left.
        shortest: (b,) tokens of the shortest of a row's prompts.
        evidence: of the last step.
    """

    rows: list[int]
    held: Rows
    seen: Tensor
    shortest: Tensor
    evidence: Evidence | None = None

    def select(self, places: Sequence[int]) -> None:
        """Go on with the rows in these places; at least one."""
        index = torch.tensor(places)
        self.rows = [self.rows[place] for place in places]
        self.held.select(index)
        self.seen, self.shortest = self.seen[index], self.shortest[index]
        self.evidence = None if self.evidence is None else self.evidence.select(index)


class Decoding:
    """Prompts under way: an iterator of :class:`Step`. Rows leave it at EOS, by ``end_row``, or at full length.

    Attributes:
        longest: row -> tokens of its longest possible answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        waiting: dict[int, Prompt],
        longest: dict[int, int],
        chooser: Chooser,
        eos: frozenset[int],
        at_once: int | None,
    ) -> None:
        self.longest = longest
        self._lanes, self._rule, self._first = decoder.lanes, decoder.rule, decoder.model.names[0]
        self._waiting, self._chooser, self._eos = waiting, chooser, eos
        self._at_once = at_once or max(len(waiting), 1)
        self._only = next(iter(waiting.values())) if len(waiting) == 1 else None
        self._made = dict.fromkeys(longest, 0)  # row -> tokens of its answer
        self._ended: set[int] = set()

    def end_row(self, row: int) -> None:
        """This row needs no more tokens (a stop string was found)."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[Step]:
        running: _Batch | None = None
        last: _Batch | None = None
        try:
            while running is not None or self._waiting:
                entering = self._entering(running)
                last = entering or running
                assert last is not None
                yield self._step(last)
                running = last if running is None or entering is None else self._joined(running, entering)
                running = self._without_ended(running)
        finally:
            if self._only is not None and last is not None:
                answer = last.seen[0, len(self._only[self._first]) :].tolist()
                self._lanes.keep(last.held, self._only, answer)

    def _entering(self, running: _Batch | None) -> _Batch | None:
        """Rows for the free places, unless too few are free: with every entry, what is held of all rows is copied."""
        free = self._at_once - (0 if running is None else len(running.rows))
        if running is not None and free < max(1, min(self._at_once // 4, len(self._waiting))):
            return None
        if not self._waiting:
            return None
        rows = list(self._waiting)[:free]
        prompts = [self._waiting.pop(row) for row in rows]
        room = max(self.longest[row] for row in rows)
        held = self._lanes.begin(prompts, room, remember=not self._rule.reads_text)
        seen = Rows.padded_ids([prompt[self._first] for prompt in prompts])
        shortest = torch.tensor([min(map(len, prompt.values())) for prompt in prompts])
        return _Batch(rows, held, seen, shortest)

    def _joined(self, first: _Batch, second: _Batch) -> _Batch:
        """Two batches that have done the same step as one."""
        rows = [*first.rows, *second.rows]
        held = self._lanes.join(first.held, second.held, max(self.longest[row] - self._made[row] for row in rows))
        length = max(first.seen.shape[1], second.seen.shape[1])
        seen = torch.cat([_lengthened(part.seen, length) for part in (first, second)])
        assert first.evidence is not None and second.evidence is not None
        evidence = first.evidence.join(second.evidence)
        return _Batch(rows, held, seen, torch.cat([first.shortest, second.shortest]), evidence)

    @torch.inference_mode()
    def _step(self, batch: _Batch) -> Step:
        hidden = self._lanes.forward(batch.held)
        evidence = batch.evidence = self._gathered(batch, hidden)
        logits = self._lanes.own_logits({name: part[:, -1] for name, part in hidden.items()})
        alone = [own.log_softmax(-1) for own in logits] if self._rule.reads_text else []
        scores, weights = self._rule.mix(logits, evidence)
        chosen = self._chooser.choose(scores, batch.seen.to(scores.device), batch.rows)
        if alone:
            index = chosen.to(scores.device)[:, None]
            assert evidence.response is not None
            evidence.response.add_(torch.cat([own.gather(1, index) for own in alone], dim=1))
        batch.seen = torch.cat([batch.seen, chosen[:, None]], dim=1)
        batch.held.append(chosen[:, None])
        step = Step(list(batch.rows), chosen.tolist(), weights.float().cpu())
        for row, token in zip(step.rows, step.tokens, strict=True):
            self._made[row] += 1
            if token in self._eos or self._made[row] == self.longest[row]:
                self._ended.add(row)
        return step

    def _gathered(self, batch: _Batch, hidden: dict[str, Tensor]) -> Evidence:
        """What the rule may go by for the token behind the last position of ``hidden``, name -> (b, s, d)."""
        gate = self._lanes.gate_weights({name: part[:, -1] for name, part in hidden.items()})
        if (last := batch.evidence) is not None:
            return Evidence(gate, last.at_prompt_end, last.state, last.prompt, last.shortest, last.response)
        state = hidden[self._first][:, -1].to(gate.device)
        if not self._rule.reads_text:
            return Evidence(gate, gate, state)
        prompt = self._lanes.mean_likelihood(hidden, batch.held)
        return Evidence(gate, gate, state, prompt, batch.shortest.to(gate.device), torch.zeros_like(gate))

    def _without_ended(self, batch: _Batch) -> _Batch | None:
        kept = [place for place, row in enumerate(batch.rows) if row not in self._ended]
        if not kept:
            return None
        if len(kept) < len(batch.rows):
            batch.select(kept)
        return batch


def _lengthened(seen: Tensor, length: int) -> Tensor:
    """(b, length): padded on the left with each row's own first id."""
    return torch.cat([seen[:, :1].expand(-1, length - seen.shape[1]), seen], dim=1)
