"""Other random numbers for the same tests: ``pytest --seed-offset N`` adds N to every seed that torch is given.

A tolerance that is derived holds for any; one that was found with the seeds as they are written does not. The offset
comes through the environment, so that the ranks of a test have it, too; importing this module applies it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

OFFSET = int(os.environ["ULTRAFUSER_TEST_SEED_OFFSET"])


class _Shifted(torch.Generator):
    def manual_seed(self, seed: int) -> Any:
        super().manual_seed(seed + OFFSET)
        return self


_seed_all = torch.manual_seed
torch.Generator = _Shifted  # type: ignore[misc]
torch.manual_seed = lambda seed: _seed_all(int(seed) + OFFSET)
