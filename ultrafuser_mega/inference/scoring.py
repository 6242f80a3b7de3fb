"""How likely texts are: log-likelihoods of continuations behind contexts, as multiple-choice benchmarks ask for them.

What contexts have in common is read once: a few-shot preamble for a whole benchmark, a question for all its options.
Only positions that predict a continuation's token get logits, a bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.lanes import Lanes, Sequences, positions_of
from ultrafuser_mega.inference.mixing import GATE, RULES, Evidence, Rule
from ultrafuser_mega.inference.prefill import WORTH_WAITING, common_length
from ultrafuser_mega.inference.requests import Prompt
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

_LOGITS_AT_ONCE = 1 << 26  # float32 values of all specialists together: 256 MiB


@dataclass(frozen=True)
class Continued:
    """A continuation and what it follows.

    Attributes:
        context: specialist -> its ids, at least one.
        continuation: the ids that all specialists read behind it, at least one.
    """

    context: Prompt
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: its log-likelihood, and whether each of its tokens is the likeliest."""

    total: float
    greedy: bool


@dataclass(frozen=True)
class _End:
    """Of a context: specialist -> (1, d_j) the last hidden state; (1, n) mean log-likelihood, where a rule reads it."""

    states: dict[str, Tensor]
    prompt: Tensor | None


class Scorer:
    """Log-likelihoods under one model.

    Args:
        model: its specialists are on their devices already.
        rule: how they are mixed.
        batch_tokens: of contexts, padding included, that are read at once.
    """

    def __init__(self, model: UltraFuserForCausalLM, rule: Rule = RULES[GATE], batch_tokens: int = 4096) -> None:
        self._rule, self._batch_tokens = rule, batch_tokens
        longest = max(positions_of(model).values())
        # Contexts of a batch, what follows some of them, and a preamble that they have in common.
        self._lanes = Lanes(model, 3 * max(batch_tokens, longest))
        self._names = list(model.names)
        self._rows_at_once = max(1, _LOGITS_AT_ONCE // (len(model.names) * model.config.vocab_size))

    def score(self, requests: Sequence[Continued]) -> Iterator[tuple[int, Likelihood]]:
        """(number of the request, its likelihood) for all of them, in the order in which they are computed.

        Raises:
            InputError: a context with its continuation is longer than a specialist reads.
        """
        for request in requests:
            self._check(request)
        behind: dict[tuple[tuple[int, ...], ...], list[int]] = {}  # context -> its requests
        for number, request in enumerate(requests):
            behind.setdefault(tuple(tuple(ids) for ids in request.context.values()), []).append(number)
        groups = sorted(behind.values(), key=lambda group: -_longest(requests[group[0]]))
        while groups:
            batch = self._first_batch(requests, groups)
            del groups[: len(batch)]
            yield from self._score_batch(requests, batch)

    def _check(self, request: Continued) -> None:
        for name, positions in self._lanes.positions.items():
            length = len(request.context[name]) + len(request.continuation) - 1  # the last token is never read
            if length > positions:
                raise InputError(f"{length} tokens are more than the {positions} that {name} reads")

    def _first_batch(self, requests: Sequence[Continued], groups: list[list[int]]) -> list[list[int]]:
        """As many of the groups, longest contexts first, as may be read at once; at least one."""
        most = max(1, self._batch_tokens // _longest(requests[groups[0][0]]))
        return groups[:most]

    @torch.inference_mode()
    def _score_batch(self, requests: Sequence[Continued], groups: list[list[int]]) -> Iterator[tuple[int, Likelihood]]:
        contexts = [requests[group[0]].context for group in groups]
        opened: list[Sequences] = []
        ends = self._read_contexts(contexts, opened)
        owners = [row for row, group in enumerate(groups) for _ in group]
        numbers = [number for group in groups for number in group]
        tails = [list(requests[number].continuation) for number in numbers]
        while numbers:
            held = self._open_tails(contexts, owners, tails)
            rows = len(held)
            found = self._score_tails(contexts, ends, owners[:rows], tails[:rows], held)
            yield from zip(numbers[:rows], found, strict=True)
            del numbers[:rows], owners[:rows], tails[:rows]
        for sequences in opened:
            self._lanes.close(sequences)

    def _read_contexts(self, contexts: Sequence[Prompt], opened: list[Sequences]) -> list[_End]:
        """Read them; what several begin with, such as a few-shot preamble, is read once.

        Args:
            contexts: no more than the caches have room for.
            opened: gets what is held of them.
        """
        ends: dict[int, _End] = {}
        left = list(range(len(contexts)))
        while left:
            wave: list[int] = []
            for row in left:
                if self._rule.reads_text or not any(self._share(contexts[row], contexts[other]) for other in wave):
                    wave.append(row)
            left = [row for row in left if row not in wave]
            held = [self._lanes.open(contexts[row], 0, share=not self._rule.reads_text) for row in wave]
            rows = [sequences for sequences in held if sequences is not None]  # all
            spans = {name: [(sequences[name], sequences[name].left) for sequences in rows] for name in self._names}
            hidden = self._lanes.read(spans)
            for place, (row, sequences) in enumerate(zip(wave, rows, strict=True)):
                prompt = None
                if self._rule.reads_text:
                    prompt = self._mean_likelihood({name: part[place] for name, part in hidden.items()}, contexts[row])
                ends[row] = _End({name: part[place, -1:] for name, part in hidden.items()}, prompt)
                self._lanes.keep(sequences)
                opened.append(sequences)
        return [ends[row] for row in range(len(contexts))]

    def _open_tails(
        self, contexts: Sequence[Prompt], owners: Sequence[int], tails: Sequence[list[int]]
    ) -> list[Sequences | None]:
        """As many of the next continuations as may be read at once, one at least; None: nothing of it is read."""
        held: list[Sequences | None] = []
        longest = 0
        for owner, tail in zip(owners, tails, strict=True):
            longest = max(longest, len(tail))
            if held and (len(held) + 1) * longest > self._batch_tokens:
                break
            if len(tail) == 1:
                held.append(None)
                continue
            whole = {name: [*ids, *tail[:-1]] for name, ids in contexts[owner].items()}
            opened = self._lanes.open(whole, 0)
            if opened is None:
                break
            held.append(opened)
        return held

    def _share(self, context: Prompt, other: Prompt) -> bool:
        """Whether reading ``other`` first saves much of ``context``."""
        for name, ids in context.items():
            common = common_length(ids[:-1], other[name])
            if common - len(self._lanes.pools[name].slots.known(ids[:common])) >= WORTH_WAITING:
                return True
        return False

    def _mean_likelihood(self, hidden: Mapping[str, Tensor], context: Prompt) -> Tensor:  # (1, n)
        """Of a context's tokens but the first, under every specialist, whose (s, d_j) end with its states."""
        means = []
        for name, ids in context.items():
            if len(ids) == 1:
                means.append(torch.zeros((), device=self._lanes.home))
            else:
                means.append(self._lanes.likelihood(name, hidden[name][-len(ids) : -1], ids[1:]).mean())
        return torch.stack(means)[None]

    def _score_tails(
        self,
        contexts: Sequence[Prompt],
        ends: Sequence[_End],
        owners: Sequence[int],
        tails: Sequence[list[int]],
        held: Sequence[Sequences | None],
    ) -> list[Likelihood]:
        """Of continuations, each behind one of the contexts, which have been read; closes what is held of them."""
        states = self._tail_states(ends, owners, tails, held)
        row_of = torch.tensor([row for row, tail in enumerate(tails) for _ in tail])
        of_end = torch.tensor([owners[row] for row in row_of.tolist()])
        gate = self._lanes.gate_weights(states)
        device = gate.device
        at_end = self._lanes.gate_weights({name: torch.cat([end.states[name] for end in ends]) for name in self._names})
        state = torch.cat([end.states[self._names[0]] for end in ends])
        prompt = [end.prompt for end in ends if end.prompt is not None]
        shortest = torch.tensor([min(map(len, context.values())) for context in contexts])
        evidence = Evidence(
            gate,
            at_end[of_end.to(device)],
            state[of_end.to(device)],
            torch.cat(prompt)[of_end.to(device)] if prompt else None,
            shortest[of_end].to(device),
        )
        targets = torch.tensor([token for tail in tails for token in tail], device=device)
        likelihood, greedy = self._of_rows(states, targets, evidence, row_of)
        totals = torch.zeros(len(tails), dtype=torch.float64).index_add_(0, row_of, likelihood.double().cpu())
        missed = torch.zeros(len(tails), dtype=torch.int64).index_add_(0, row_of, (~greedy).long().cpu())
        return [Likelihood(total, misses == 0) for total, misses in zip(totals.tolist(), missed.tolist(), strict=True)]

    def _tail_states(
        self,
        ends: Sequence[_End],
        owners: Sequence[int],
        tails: Sequence[list[int]],
        held: Sequence[Sequences | None],
    ) -> dict[str, Tensor]:
        """Specialist -> (R, d_j) where the tails' tokens are predicted, tail by tail."""
        opened = [sequences for sequences in held if sequences is not None]
        spans = {name: [(sequences[name], sequences[name].left) for sequences in opened] for name in self._names}
        hidden = self._lanes.read(spans)
        states: dict[str, list[Tensor]] = {name: [] for name in self._names}
        for name, parts in states.items():
            rows = iter(hidden.get(name, ()))
            for owner, tail, sequences in zip(owners, tails, held, strict=True):
                parts.append(ends[owner].states[name])
                if sequences is not None:
                    parts.append(next(rows)[1 - len(tail) :])
        for sequences in opened:
            self._lanes.close(sequences)
        return {name: torch.cat(parts) for name, parts in states.items()}

    def _of_rows(
        self, hidden: dict[str, Tensor], targets: Tensor, evidence: Evidence, row_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(R,) log-likelihood of each target, and whether it is the likeliest.

        Args:
            hidden: name -> (R, d_j).
            targets: (R,).
            evidence: of the rows.
            row_of: (R,) the continuation that a row belongs to; ascending.
        """
        if self._rule.reads_text:
            alone = torch.cat([self._alone(hidden, targets, part) for part in self._parts(len(targets))])
            before = alone.double().cumsum(0) - alone
            first = torch.searchsorted(row_of, torch.arange(int(row_of[-1]) + 1))
            start = before[first.to(alone.device)][row_of.to(alone.device)]
            evidence = Evidence(
                evidence.gate,
                evidence.at_prompt_end,
                evidence.state,
                evidence.prompt,
                evidence.shortest,
                (before - start).float(),
            )
        found = []
        for part in self._parts(len(targets)):
            scores, _ = self._rule.mix(self._logits(hidden, part), evidence.select(part))
            wanted = targets[part.to(targets.device)]
            chosen = scores.gather(1, wanted[:, None])[:, 0]
            found.append((chosen - scores.logsumexp(-1), scores.argmax(-1) == wanted))
        likelihood, greedy = zip(*found, strict=True)
        return torch.cat(likelihood), torch.cat(greedy)

    def _parts(self, rows: int) -> tuple[Tensor, ...]:
        return torch.arange(rows).split(self._rows_at_once)

    def _logits(self, hidden: dict[str, Tensor], part: Tensor) -> list[Tensor]:
        return list(self._lanes.own_logits({name: own[part.to(own.device)] for name, own in hidden.items()}).values())

    def _alone(self, hidden: dict[str, Tensor], targets: Tensor, part: Tensor) -> Tensor:  # (len(part), n)
        wanted = targets[part.to(targets.device)][:, None]
        return torch.cat([own.log_softmax(-1).gather(1, wanted) for own in self._logits(hidden, part)], dim=1)


def _longest(request: Continued) -> int:
    return max(map(len, request.context.values()))
