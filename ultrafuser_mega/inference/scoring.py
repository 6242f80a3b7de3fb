"""How likely texts are: log-likelihoods of continuations behind contexts, as multiple-choice benchmarks ask for them.

What contexts have in common is read once: a few-shot preamble for a whole benchmark, a question for all its options.
Only positions that predict a continuation's token get logits, a bounded number at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.lanes import Lanes, Prompt
from ultrafuser_mega.inference.mixing import GATE, RULES, Evidence, Rule
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM

_LOGITS_AT_ONCE = 1 << 26  # float32 values of all specialists together: 256 MiB


@dataclass(frozen=True)
class Request:
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


class Scorer:
    """Log-likelihoods under one model.

    Args:
        model: its specialists are on their devices already.
        rule: how they are mixed.
        batch_tokens: of contexts, padding included, that are read at once.
    """

    def __init__(self, model: UltraFuserForCausalLM, rule: Rule = RULES[GATE], batch_tokens: int = 4096) -> None:
        self._lanes, self._rule, self._batch_tokens = Lanes(model), rule, batch_tokens
        self._rows_at_once = max(1, _LOGITS_AT_ONCE // (len(model.names) * model.config.vocab_size))

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
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

    def _check(self, request: Request) -> None:
        for name, positions in self._lanes.positions.items():
            length = len(request.context[name]) + len(request.continuation) - 1  # the last token is never read
            if length > positions:
                raise InputError(f"{length} tokens are more than the {positions} that {name} reads")

    def _first_batch(self, requests: Sequence[Request], groups: list[list[int]]) -> list[list[int]]:
        """As many of the groups, longest contexts first, as may be read at once; at least one."""
        longest, rows = _longest(requests[groups[0][0]]), 0
        batch: list[list[int]] = []
        for group in groups:
            tails = max(len(requests[number].continuation) for number in group)
            rows += len(group)
            if batch and rows * (longest + tails) > self._batch_tokens:
                break
            batch.append(group)
        return batch

    @torch.inference_mode()
    def _score_batch(self, requests: Sequence[Request], groups: list[list[int]]) -> Iterator[tuple[int, Likelihood]]:
        contexts = [requests[group[0]].context for group in groups]
        numbers = [number for group in groups for number in group]
        owners = torch.tensor([row for row, group in enumerate(groups) for _ in group])
        tails = [list(requests[number].continuation) for number in numbers]
        rows = self._lanes.begin(contexts, max(map(len, tails)), remember=not self._rule.reads_text)
        hidden = self._lanes.forward(rows)
        ends = {name: part[:, -1] for name, part in hidden.items()}
        prompt = self._lanes.mean_likelihood(hidden, rows) if self._rule.reads_text else None
        at_end = self._lanes.gate_weights(ends)
        states = {name: [part[owners.to(part.device)][:, None]] for name, part in ends.items()}
        if max(map(len, tails)) > 1:
            rows.select(owners)
            ids, mask = _right_padded([tail[:-1] for tail in tails])
            rows.append(ids, mask)
            for name, part in self._lanes.forward(rows).items():
                states[name].append(part)
        # Row by row, the positions that predict a token of its continuation.
        kept = _kept([len(tail) for tail in tails])
        flat = {name: torch.cat(parts, dim=1)[kept.to(parts[0].device)] for name, parts in states.items()}
        device = at_end.device
        row_of = kept.nonzero()[:, 0]
        shortest = torch.tensor([min(map(len, context.values())) for context in contexts])
        evidence = Evidence(
            self._lanes.gate_weights(flat),
            at_end[owners[row_of].to(device)],
            next(iter(ends.values()))[owners[row_of].to(device)],
            None if prompt is None else prompt[owners[row_of].to(device)],
            shortest[owners[row_of]].to(device),
        )
        targets = torch.tensor([token for tail in tails for token in tail], device=device)
        likelihood, greedy = self._of_rows(flat, targets, evidence, row_of)
        totals = torch.zeros(len(tails), dtype=torch.float64).index_add_(0, row_of, likelihood.double().cpu())
        missed = torch.zeros(len(tails), dtype=torch.int64).index_add_(0, row_of, (~greedy).long().cpu())
        for number, total, misses in zip(numbers, totals.tolist(), missed.tolist(), strict=True):
            yield number, Likelihood(total, misses == 0)

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
        return self._lanes.own_logits({name: own[part.to(own.device)] for name, own in hidden.items()})

    def _alone(self, hidden: dict[str, Tensor], targets: Tensor, part: Tensor) -> Tensor:  # (len(part), n)
        wanted = targets[part.to(targets.device)][:, None]
        return torch.cat([own.log_softmax(-1).gather(1, wanted) for own in self._logits(hidden, part)], dim=1)


def _longest(request: Request) -> int:
    return max(map(len, request.context.values()))


def _right_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Ids (b, s) and their mask (b, s), None where nothing is padded."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = torch.tensor([[*row, *[0] * gap] for gap, row in zip(gaps, rows, strict=True)])
    if not any(gaps):
        return ids, None
    return ids, torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])


def _kept(lengths: Sequence[int]) -> Tensor:
    """(b, longest) bool: the first ``lengths[row]`` of each row."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
