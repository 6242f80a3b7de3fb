"""How the next token is chosen from the fused logits: greedily, or at random under transformers' own filters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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
        seed: of the draws. Row i of a batch has a stream of its own, (seed, i): how rows are batched does not matter.

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
            "seed": (0 <= self.seed < 2**32, "0 to 2^32 - 1"),
        }
        for option, (good, wanted) in ranges.items():
            if not good:
                value = getattr(self, option.replace("-", "_"))
                raise InputError(f"--{option} {value}: expected {wanted}")

    def processors(self) -> LogitsProcessorList:
        """What changes the logits before the choice."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
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


class Chooser:
    """Chooses a token for every row of a batch.

    Args:
        sampling: the settings.
        rows: the rows' numbers, which select their random streams.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        self._processors = sampling.processors()
        self._greedy = sampling.temperature == 0
        self._generators = {row: torch.Generator().manual_seed(_mixed(sampling.seed, row)) for row in rows}

    def choose(self, logits: Tensor, seen: Tensor, rows: Sequence[int]) -> Tensor:  # (b,) int64 on the CPU
        """Token ids for ``rows``.

        Args:
            logits: (b, V) float32.
            seen: (b, s) ids of prompt and answer so far.
            rows: the rows' numbers.

        Raises:
            InputError: a logit is not finite; nothing that is chosen then means anything.
        """
        if not logits.isfinite().all():
            raise InputError(
                "the model's logits are not finite: its weights are damaged (ultrafuser verify), or overflow in --dtype"
            )
        scores = self._processors(seen, logits)  # type: ignore[arg-type]
        if self._greedy:
            return scores.argmax(dim=-1).cpu()
        probabilities = scores.softmax(dim=-1).cpu()  # one stream per row, the same on every device
        draws = [
            torch.multinomial(p, 1, generator=self._generators[row]) for row, p in zip(rows, probabilities, strict=True)
        ]
        return torch.cat(draws)


def _mixed(seed: int, row: int) -> int:
    """32 bits, which is all that PyTorch's CPU generator takes of a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:4], "little")
