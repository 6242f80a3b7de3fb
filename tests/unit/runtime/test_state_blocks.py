"""Blocks of an optimizer's state cut parameters anywhere, and change no result."""

from __future__ import annotations

import pytest
import torch
from support.host_state_cases import assert_updated_as_on_the_device

from ultrafuser_mega.runtime import host_states


@pytest.mark.parametrize("apart", [False, True], ids=["in place", "through two slots, as on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_blocks_cut_are_updated_as_whole_ones(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, apart: bool
) -> None:
    monkeypatch.setattr(host_states, "BLOCK", 4096)
    assert_updated_as_on_the_device(torch.device("cpu"), dtype, apart=apart)
