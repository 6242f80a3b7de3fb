"""Numbers that are none choose no token."""

from __future__ import annotations

import pytest
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.sampling import Chooser, Sampling


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_choose_nothing(value: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    chooser = Chooser(Sampling(temperature=temperature), [0, 1])
    assert len(chooser.choose(logits, torch.zeros(2, 1, dtype=torch.int64), [0, 1])) == 2
    logits[1, 3] = value
    with pytest.raises(InputError, match="logits are not finite"):
        chooser.choose(logits, torch.zeros(2, 1, dtype=torch.int64), [0, 1])
