"""How the next token is chosen from the fused logits: greedily, or at random under transformers' own filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.noise import draw_key, gumbel


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice, with the meaning and the order that transformers' ``generate`` gives them.

    Attributes:
        temperature: 0 takes the most likely token; above, the softmax of logits / temperature is drawn from.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens whose probabilities add up to this; 1: all.
        min_p: only tokens at least this times as likely as the likeliest; 0: all.
        repetition_penalty: divides the logits of tokens in the first specialist's prompt or the answer; 1: none.
        presence_penalty: is subtracted from the logits of tokens in the answer, as OpenAI's interface has it.
        frequency_penalty: likewise, times how often the token is there.
        logit_bias: token -> what is added to its logit.
        seed: of the draws, each of which is a function of the seed, its request's row and the token's position: how
            requests are batched does not matter.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (
                self.temperature == 0 or 1e-3 <= self.temperature < float("inf"),
                "0 (greedy) or 0.001 or more",
            ),
            "top-k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top-p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min-p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition-penalty": (self.repetition_penalty > 0, "above 0"),
            "presence-penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency-penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "seed": (-(2**63) <= self.seed < 2**63, "-2^63 to 2^63 - 1"),
        }
        for option, (good, wanted) in ranges.items():
            if not good:
                value = getattr(self, option.replace("-", "_"))
                raise InputError(f"--{option} {value}: expected {wanted}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, just so."""
        return self.temperature == 0 and not (
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        )

    @property
    def filters(self) -> tuple[float, int, float, float]:
        """What rows must have in common for ``processors`` to be the same."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def processors(self) -> LogitsProcessorList:
        """What changes the logits of a draw, behind penalties and bias."""
        chain = LogitsProcessorList()
        if self.temperature > 0:
            if self.temperature != 1:
                chain.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                chain.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                chain.append(TopPLogitsWarper(self.top_p))
            if self.min_p > 0:
                chain.append(MinPLogitsWarper(self.min_p))
        return chain


@dataclass(frozen=True)
class Place:
    """Where a token is chosen.

    Attributes:
        sampling: how.
        row, position: of the draw: the request's row, and how many tokens its answer has.
        prompt: ids of the first specialist's.
        answer: ids so far.
        mask: sets scores (V,) of tokens that may not come to -inf, in place; None: all may.
    """

    sampling: Sampling
    row: int
    position: int
    prompt: Sequence[int]
    answer: Sequence[int]
    mask: Callable[[Tensor], None] | None = None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, just so."""
        return self.sampling.greedy and self.mask is None


def choose(scores: Tensor, places: Sequence[Place]) -> Tensor:  # (R,) int64 on the scores' device
    """A token for every place.

    Args:
        scores: (R, V) float32; where they are not finite, so is not what is chosen.
        places: of the R rows.
    """
    chosen = scores.argmax(dim=-1)
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for number, place in enumerate(places):
        if not place.plain:
            groups.setdefault(place.sampling.filters, []).append(number)
    for numbers in groups.values():
        index = torch.tensor(numbers, device=scores.device)
        members = [places[number] for number in numbers]
        part = scores[index]
        for own, place in zip(part, members, strict=True):
            _adjust(own, place)
        part = members[0].sampling.processors()(index[:, None], part)  # type: ignore[arg-type]
        if members[0].sampling.temperature > 0:
            keys = [draw_key(place.sampling.seed, place.row, place.position) for place in members]
            part = part + gumbel(keys, part.shape[-1], part.device)
        chosen[index] = part.argmax(dim=-1)
    return chosen


def _adjust(scores: Tensor, place: Place) -> None:
    """Penalties and bias of one row, (V,), in place; transformers' order, then OpenAI's."""
    sampling = place.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor([[*place.prompt, *place.answer]], device=scores.device)
        penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        scores.copy_(penalty(seen, scores[None])[0])
    if place.answer and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(place.answer, device=scores.device).unique(return_counts=True)
        scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=scores.device)
        scores[ids] += torch.tensor(list(sampling.logit_bias.values()), device=scores.device)
    if place.mask is not None:
        place.mask(scores)
