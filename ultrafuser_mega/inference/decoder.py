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
        rows = self.lanes.begin(prompts, max(longest.values()), remember=not self.rule.reads_text)
        return Decoding(self, prompts, rows, longest, Chooser(sampling, list(longest)), frozenset(eos))

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer may have before a specialist's positions end; InputError where there is none."""
        left = []
        for name, positions in self.lanes.positions.items():
            length = len(prompt[name])
            if length >= positions:
                raise InputError(f"the prompt has {length} tokens for {name}, which reads {positions} at most")
            left.append(positions - length)
        return min(left)


class Decoding:
    """A batch under way: an iterator of :class:`Step`. Rows leave it at EOS, by ``end_row``, or at full length.

    Attributes:
        longest: row -> tokens of its longest possible answer.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Prompt],
        rows: Rows,
        longest: dict[int, int],
        chooser: Chooser,
        eos: frozenset[int],
    ) -> None:
        self.longest = longest
        self._lanes, self._rule = decoder.lanes, decoder.rule
        self._held, self._chooser, self._eos = rows, chooser, eos
        self._rows = list(longest)
        self._prompts = prompts
        self._steps = 0
        self._ended: set[int] = set()
        self._evidence: Evidence | None = None  # of the last step
        self._seen = rows.padded_ids([prompt[decoder.model.names[0]] for prompt in prompts])

    def end_row(self, row: int) -> None:
        """This row needs no more tokens (a stop string was found)."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[Step]:
        try:
            while self._rows:
                yield self._step()
                self._drop_ended()
        finally:
            if len(self._prompts) == 1:
                first = next(iter(self._prompts[0].values()))
                self._lanes.keep(self._held, self._prompts[0], self._seen[0, len(first) :].tolist())

    @torch.inference_mode()
    def _step(self) -> Step:
        hidden = self._lanes.forward(self._held)
        evidence = self._evidence = self._gather(hidden)
        logits = self._lanes.own_logits({name: part[:, -1] for name, part in hidden.items()})
        alone = [own.log_softmax(-1) for own in logits] if self._rule.reads_text else []
        scores, weights = self._rule.mix(logits, evidence)
        chosen = self._chooser.choose(scores, self._seen.to(scores.device), self._rows)
        if alone:
            index = chosen.to(scores.device)[:, None]
            likelihood = torch.cat([own.gather(1, index) for own in alone], dim=1)
            assert evidence.response is not None
            evidence.response.add_(likelihood)
        self._steps += 1
        self._seen = torch.cat([self._seen, chosen[:, None]], dim=1)
        self._held.append(chosen[:, None])
        step = Step(list(self._rows), chosen.tolist(), weights.float().cpu())
        for row, token in zip(step.rows, step.tokens, strict=True):
            if token in self._eos or self._steps == self.longest[row]:
                self._ended.add(row)
        return step

    def _gather(self, hidden: dict[str, Tensor]) -> Evidence:
        """What the rule may go by for the token behind the last position of ``hidden``, name -> (b, s, d)."""
        gate = self._lanes.gate_weights({name: part[:, -1] for name, part in hidden.items()})
        if self._evidence is not None:
            last = self._evidence
            return Evidence(gate, last.at_prompt_end, last.prompt, last.shortest, last.response)
        if not self._rule.reads_text:
            return Evidence(gate, gate)
        prompt = self._lanes.mean_likelihood(hidden, self._held)
        shortest = torch.tensor([min(map(len, prompt.values())) for prompt in self._prompts], device=gate.device)
        return Evidence(gate, gate, prompt, shortest, torch.zeros_like(gate))

    def _drop_ended(self) -> None:
        kept = [place for place, row in enumerate(self._rows) if row not in self._ended]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in kept]
        if not kept:
            return
        index = torch.tensor(kept)
        self._seen = self._seen[index]
        self._held.select(index)
        if self._evidence is not None:
            self._evidence = self._evidence.select(index)
