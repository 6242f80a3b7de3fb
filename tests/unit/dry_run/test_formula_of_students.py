"""``plan`` predicts what a dry run counts where a student learns from a fused model, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.trio import CPU, ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.dry_run.formula import predictions
from ultrafuser_mega.dry_run.rehearse import rank_classes, rehearse
from ultrafuser_mega.planning.preflight import RunPlan, laid_out, plan_layouts

DISJOINT: dict[str, Any] = {
    "kind": "disjoint",
    "specialists": {"text": {}, "code": {"tp": 2}, "math": {}, "student": {}},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one rank": (ONE, {}, {}),
    "one rank, bf16, both divergences and labels": (ONE, {"dtype": "bf16"}, {"reverse": 0.3, "labels": 0.2}),
    "one rank, adapters": (ONE, {"lora": {"rank": 4}}, {}),
    "disjoint": (DISJOINT, {}, {"temperature": 2.0}),
}


def plan_of(trio: Path, layout: dict[str, Any], more: dict[str, Any], lesson: dict[str, Any]) -> RunPlan:
    """A trio that teaches one more model, which begins as math."""
    tree = config_tree(trio, trio, layout) | more
    tree["specialists"]["student"] = tree["specialists"]["math"]
    tree["stage1"]["steps"] = 0
    mode = "lora" if "lora" in more else "full"
    tree["stage2"]["train"] = {"gate": "frozen", "specialists": "frozen", "student": mode}
    tree["distil"] = {"student": "student", "teacher": str(trio), **lesson}
    config = FuserConfig.model_validate(tree)
    return laid_out(config, plan_layouts(config)[0].world_size)


@pytest.mark.parametrize("name", CASES)
def test_peak_and_flops_of_a_distillation_are_predicted(trio: Path, name: str) -> None:
    plan = plan_of(trio, *CASES[name])
    for rank in rank_classes(plan):
        rehearsal = rehearse(plan, rank, CPU)
        predicted = predictions(plan, rehearsal, "cpu")
        (stage,) = (part for part in rehearsal.parts if part.name == "stage 2")
        found = predicted[rank, "stage 2"]
        assert found.flops == pytest.approx(sum(stage.flops.values()), 0.01), rank
        assert found.peak == pytest.approx(stage.peak_bytes, 0.05), rank
