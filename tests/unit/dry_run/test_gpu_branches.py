"""The program's GPU branches, run on fake CUDA tensors: no device is mixed with another, the host hardly ever waits.

A tensor left on the CPU ends a rehearsal with an error that names the operation and its line; a new .item(), a blocking
copy or a boolean index shows here by file and line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.fake_cuda_worker import on_fake_cuda
from support.trio import COLOCATED_TP2, COLOCATED_TP2_PP2, DISJOINT_8, ONE, config_tree

from ultrafuser_mega.reporting.rehearsal import Part, Rehearsal

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": (ONE, {"loss": {"backend": "streaming"}}),
    "tp 2, sequence parallel": (COLOCATED_TP2, {"parallel": {"sequence_parallel": True}}),
    "tp 2, pp 2, recomputed": (COLOCATED_TP2_PP2, {"parallel": {"recompute_layers": "all"}}),
    "disjoint, unequal": (DISJOINT_8, {}),
    "dp 2, sharded optimizer": (ONE | {"dp": 2}, {"parallel": {"distributed_optimizer": True}}),
    "state on the host": (COLOCATED_TP2, {"optimizer": {"state": "host"}}),
}


@pytest.fixture(scope="module")
def rehearsals(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rehearsal]]:
    folder = tmp_path_factory.mktemp("fake")
    trees = [config_tree(trio, folder, layout) | {"dtype": "bf16"} | more for layout, more in LAYOUTS.values()]
    return dict(zip(LAYOUTS, on_fake_cuda(trees), strict=True))


def _parts(rehearsals: list[Rehearsal], prefix: str) -> list[Part]:
    return [part for rehearsal in rehearsals for part in rehearsal.parts if part.name.startswith(prefix)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_host_waits_once_a_step_for_what_is_logged(rehearsals: dict[str, list[Rehearsal]], layout: str) -> None:
    for part in _parts(rehearsals[layout], "stage"):
        assert len(part.waits) == 1, part.waits
        ((where, times),) = part.waits.items()
        assert where.startswith("a number is read at training/totals.py"), part.waits
        assert times == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_optimizer_needs_no_memory_of_its_own_beside_its_state(
    rehearsals: dict[str, list[Rehearsal]], layout: str
) -> None:
    for part in _parts(rehearsals[layout], "stage 2"):
        assert part.peak.get("update", 0) <= 4096  # clipping's norms
        assert part.peak["activations"] > 0  # so the step's peak is in forward and backward


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_flash_attention(rehearsals: dict[str, list[Rehearsal]], layout: str) -> None:
    for part in _parts(rehearsals[layout], "stage"):
        attention = {name for name in part.operations if "attention" in name or "attn" in name}
        assert attention
        assert all("flash" in name or "varlen" in name for name in attention), attention
