"""State that lies in the host's memory, on a real GPU: copies and updates meet in the right order, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.host_state_cases import assert_updated_as_on_the_device

from ultrafuser_mega.runtime import host_states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "scale"), [(1 << 12, 1), (1 << 22, 2000)])
def test_many_blocks_in_flight_give_what_state_on_the_device_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int, scale: int
) -> None:
    monkeypatch.setattr(host_states, "BLOCK", block)
    assert_updated_as_on_the_device(torch.device("cuda"), dtype, scale)
