"""Drafts for an ensemble as published (CoS, "Speculate, then collaborate", Fu et al., ICML 2025), small, to compare.

The members take turns, whoever leads: each drafts k tokens from its own distribution, all others read them, and a draft
is accepted with probability min(1, p / q) of the fused distribution p and the drafter's q, else drawn from what p has
above q; behind drafts that were all accepted one token more is drawn from p. Answers are distributed as without drafts,
but other tokens than without for the same seed. One answer at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.inference.lanes import Lanes
from ultrafuser_mega.inference.requests import Prompt


@dataclass
class Alternating:
    """What came of it.

    Attributes:
        answers: tokens of every prompt's.
        passes: member -> behind prompts.
        drafted, taken: drafts, and those that were accepted.
    """

    answers: list[list[int]] = field(default_factory=list)
    passes: Counter[str] = field(default_factory=Counter)
    drafted: int = 0
    taken: int = 0

    @property
    def behind_first(self) -> int:
        """Tokens but the first of every answer."""
        return max(sum(len(answer) - 1 for answer in self.answers), 1)

    @property
    def accepted(self) -> float:
        """Of all drafts."""
        return self.taken / max(self.drafted, 1)


@torch.inference_mode()
def answer_alternating(
    model: Any, prompts: Sequence[Prompt], k: int, temperature: float, new: int, eos: Collection[int]
) -> Alternating:
    """Answers of up to ``new`` tokens, from drafts of ``k``."""
    names, found = list(model.names), Alternating()
    lanes = Lanes(model, max(len(ids) for prompt in prompts for ids in prompt.values()) + new)
    generator = torch.Generator().manual_seed(5)
    turn = 0
    for prompt in prompts:
        held = lanes.open(prompt, new, share=False)
        assert held is not None
        states = {name: part[:, -1] for name, part in lanes.read({n: [(h, h.left)] for n, h in held.items()}).items()}
        answer = [_draw(_mixed(lanes, model, states)[0], temperature, generator)]
        while len(answer) < new and answer[-1] not in eos:
            drafter, turn = names[turn % len(names)], turn + 1
            length = min(k, new - len(answer) - 1)
            for own in held.values():
                own.ids.append(answer[-1])
            drafts, drafted_logits, drafter_states = [], [], []
            for at in range(length + 1):
                state = lanes.read({drafter: [(held[drafter], 1)]})[drafter][:, -1]
                found.passes[drafter] += 1
                drafter_states.append(state)
                if at == length:
                    break
                drafted_logits.append(lanes.own_logits({drafter: state})[drafter][0])
                drafts.append(_draw(drafted_logits[-1], temperature, generator))
                for own in held.values():
                    own.ids.append(drafts[-1])
                if drafts[-1] in eos:
                    drafter_states.append(lanes.read({drafter: [(held[drafter], 1)]})[drafter][:, -1])
                    found.passes[drafter] += 1
                    break
            states = lanes.read({n: [(h, h.left)] for n, h in held.items() if n != drafter})
            found.passes.update(list(states))
            whole = {n: part[0] for n, part in states.items()} | {drafter: torch.cat(drafter_states)}
            fused = _mixed(lanes, model, {n: whole[n] for n in names})
            found.drafted += len(drafts)
            for at, scores in enumerate(fused):
                if at == len(drafts):
                    answer.append(_draw(scores, temperature, generator))
                    break
                token, taken = _checked(scores, drafted_logits[at], drafts[at], temperature, generator)
                answer.append(token)
                found.taken += taken
                if not taken or token in eos:
                    break
            for name, own in held.items():
                own.cut(len(prompt[name]) + len(answer) - 1)
        found.answers.append(answer)
        lanes.close(held)
    return found


def _mixed(lanes: Lanes, model: Any, states: dict[str, Tensor]) -> Tensor:
    return model.mixture(lanes.own_logits(states).values(), lanes.gate_weights(states))


def _draw(scores: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not temperature:
        return int(scores.argmax())
    return int(torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator))


def _checked(
    scores: Tensor, drafter: Tensor, draft: int, temperature: float, generator: torch.Generator
) -> tuple[int, bool]:
    if not temperature:
        return int(scores.argmax()), int(scores.argmax()) == draft
    p, q = (scores / temperature).softmax(-1), (drafter / temperature).softmax(-1)
    if float(torch.rand((), generator=generator)) * float(q[draft]) <= float(p[draft]):
        return draft, True
    return int(torch.multinomial((p - q).clamp(min=0), 1, generator=generator)), False
