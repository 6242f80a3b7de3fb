"""The drafts' length on a played machine: a round takes what its passes and the tokens they read cost."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from ultrafuser_mega.inference.draft_length import DraftLength

SPECIALISTS, MOST, TOKENS = 3, 8, 400


@dataclass(frozen=True)
class Machine:
    """Seconds of a pass and of a token that it reads, and how often a draft is accepted."""

    of_pass: float
    of_token: float
    accepted: float

    def seconds_per_token(self, batch: int, length: DraftLength) -> float:
        """Of ``TOKENS`` tokens for each of ``batch`` answers that one specialist leads; rounds vary by 5 %."""
        random_ = random.Random(0)
        seconds = tokens = 0.0
        while tokens < TOKENS * batch:
            k = length.choose([0] * batch, SPECIALISTS)
            passes, read = SPECIALISTS + k, SPECIALISTS * batch * (k + 1)
            spent = (self.of_pass * passes + self.of_token * read) * random_.uniform(0.95, 1.05)
            accepted = [self.run_of_accepted(k, random_) for _ in range(batch)]
            length.learn([k] * batch, accepted, passes, read, spent)
            seconds += spent
            tokens += batch + sum(accepted)
        return seconds / tokens

    def run_of_accepted(self, k: int, random_: random.Random) -> int:
        return next((at for at in range(k) if random_.random() >= self.accepted), k)

    def best_seconds_per_token(self, batch: int) -> float:
        """With the one length that is best for this machine, chosen in hindsight."""
        return min(self.seconds_per_token(batch, DraftLength(k, adapt=False)) for k in range(MOST + 1))


@pytest.mark.parametrize("accepted", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("of_token", [0.005, 0.05, 0.2, 0.5, 1.0], ids="token costs {} of a pass".format)
def test_what_adapts_is_nearly_as_fast_as_the_best_fixed_length_whatever_passes_and_tokens_cost(
    of_token: float, batch: int, accepted: float
) -> None:
    """The 10 % are for finding out: two first guesses that may be wrong, and a round of the other kind in 32."""
    machine = Machine(1.0, of_token, accepted)
    found = machine.seconds_per_token(batch, DraftLength(MOST, adapt=True))
    assert found <= 1.1 * machine.best_seconds_per_token(batch)


def test_drafts_are_longer_where_the_leader_takes_a_pass_for_several() -> None:
    def longest(passes_per_draft: float) -> int:
        length = DraftLength(MOST, adapt=True)
        for _ in range(200):
            k = length.choose([0], SPECIALISTS)
            passes = SPECIALISTS + round(passes_per_draft * k)
            length.learn([k], [min(k, 3)], passes, 3 * (k + 1), passes + 0.001 * k)
        return max(length.choose([0], SPECIALISTS) for _ in range(2))

    assert longest(0.25) > longest(1.0)


def test_drafts_come_back_when_they_begin_to_pay() -> None:
    length = DraftLength(MOST, adapt=True)
    Machine(1.0, 0.2, 0.3).seconds_per_token(8, length)
    assert length.choose([0] * 8, SPECIALISTS) == 0
    later = Machine(1.0, 0.2, 0.9)
    later.seconds_per_token(1, length)
    assert later.seconds_per_token(1, length) <= 1.1 * later.best_seconds_per_token(1)


def test_what_does_not_adapt_always_drafts_as_many() -> None:
    length = DraftLength(5, adapt=False)
    Machine(1.0, 1.0, 0.1).seconds_per_token(8, length)
    assert length.choose([0, 1, 2], SPECIALISTS) == 5
