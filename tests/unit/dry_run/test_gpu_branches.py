"""The program's GPU branches, run on fake CUDA tensors: no device is mixed with another, the host hardly ever waits.

A tensor left on the CPU ends a rehearsal with an error that names the operation and its line; a new .item(), a blocking
copy or a boolean index shows here by file and line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.trio import COLOCATED_TP2, COLOCATED_TP2_PP2, DISJOINT_8, ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.dry_run.formula import predictions
from ultrafuser_mega.planning.preflight import plan_layouts, preflight
from ultrafuser_mega.reporting.rehearsal import Part, Rehearsal

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": (ONE, {"loss": {"backend": "streaming"}}),
    "tp 2, sequence parallel": (COLOCATED_TP2, {"parallel": {"sequence_parallel": True}}),
    "tp 2, pp 2, recomputed": (COLOCATED_TP2_PP2, {"parallel": {"recompute_layers": "all"}}),
    "disjoint, unequal": (DISJOINT_8, {}),
    "dp 2, sharded optimizer": (ONE | {"dp": 2}, {"parallel": {"distributed_optimizer": True}}),
}


@pytest.fixture(scope="module")
def rehearsals(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rehearsal]]:
    folder = tmp_path_factory.mktemp("fake")
    trees = [config_tree(trio, folder, layout) | {"dtype": "bf16"} | more for layout, more in LAYOUTS.values()]
    worker = Path(__file__).parents[2] / "support" / "fake_cuda_worker.py"
    ended = subprocess.run(
        [sys.executable, str(worker), json.dumps(trees)], capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return {name: [Rehearsal.from_json(each) for each in found[str(i)]] for i, name in enumerate(LAYOUTS)}


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formula_says_what_is_held_and_done(rehearsals: dict[str, list[Rehearsal]], trio: Path, layout: str) -> None:
    sizes, more = LAYOUTS[layout]
    config = FuserConfig.model_validate(config_tree(trio, trio, sizes) | {"dtype": "bf16"} | more)
    plan = preflight(config, plan_layouts(config)[0].world_size, resume=False)
    for rehearsal in rehearsals[layout]:
        predicted = predictions(plan, rehearsal, "cuda")
        for part in rehearsal.parts:
            if part.microbatches:
                says = predicted[rehearsal.rank, part.name]
                where = f"{part.name} of rank {rehearsal.rank}"
                assert says.peak == pytest.approx(part.peak_bytes, rel=0.05), where
                assert says.flops == pytest.approx(sum(part.flops.values()), rel=0.05), where
