"""What the specialists do without a gate, against its definition over whole distributions in float64."""

from __future__ import annotations

import math

import torch

from ultrafuser_mega.training.yardsticks import mixed_and_chosen

COUNTS = [3, 1, 4]


def test_mixed_probabilities_and_oracles_are_those_of_the_definitions() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(3, sum(COUNTS), 11, generator=generator, dtype=torch.float64)  # (n, N, V)
    target = torch.randint(11, (sum(COUNTS),), generator=generator)
    of_target = logits.softmax(2).gather(2, target.expand(3, -1)[:, :, None])[:, :, 0]  # (n, N)
    alone = -of_target.log()
    samples = [one.split(COUNTS) for one in alone]
    chosen = torch.cat([min(of_sample, key=torch.sum) for of_sample in zip(*samples, strict=True)])
    expected = torch.stack([-of_target.mean(0).log(), chosen, alone.min(0).values], dim=1)
    # Losses of order 10 come in float32: 2^-24 of them.
    torch.testing.assert_close(mixed_and_chosen(alone.float(), COUNTS), expected, rtol=0, atol=1e-6)


def test_a_sample_is_judged_by_all_its_rows_and_a_row_by_itself() -> None:
    alone = torch.tensor([[1.0, 5.0, 2.0], [3.0, 2.0, 4.0]])
    _, per_sample, per_token = mixed_and_chosen(alone, [2, 1]).unbind(1)
    assert per_sample.tolist() == [3.0, 2.0, 2.0]
    assert per_token.tolist() == [1.0, 2.0, 2.0]


def test_losses_far_from_each_other_neither_overflow_nor_vanish() -> None:
    mixed = mixed_and_chosen(torch.tensor([[0.0, 2000.0], [1000.0, 3000.0]]), [2])[:, 0]
    torch.testing.assert_close(mixed, torch.tensor([math.log(2), 2000 + math.log(2)], dtype=torch.float64))
