"""What is frozen costs a forward and nothing else: counted on fake tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.trio import COLOCATED_TP2_PP2, CPU, DISJOINT_3, DISJOINT_8, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.dry_run.rehearse import rank_classes, rehearse
from ultrafuser_mega.planning.preflight import laid_out
from ultrafuser_mega.reporting.rehearsal import Part
from ultrafuser_mega.runtime.layout import LayoutPlan

FROZEN = {"specialists": "frozen", "heads": "frozen"}


def stage_2(
    trio: Path, layout: dict[str, Any], ranks: int, train: dict[str, Any], number: int = 2
) -> tuple[LayoutPlan, dict[int, Part]]:
    """The step of stage 2, or ``number``, of one rank of each kind."""
    tree = config_tree(trio, trio, layout)
    tree["stage2"] |= {"train": train, "samples_per_class": tree["stage1"]["samples_per_class"]}
    plan = laid_out(FuserConfig.model_validate(tree), ranks)
    parts = {}
    for rank in rank_classes(plan):
        parts[rank] = next(part for part in rehearse(plan, rank, CPU).parts if part.name == f"stage {number}")
    return plan.layout, parts


@pytest.mark.parametrize(("layout", "ranks"), [(DISJOINT_8, 8), (COLOCATED_TP2_PP2, 4)])
def test_a_stage_of_the_gate_alone_does_what_stage_1_does(trio: Path, layout: dict[str, Any], ranks: int) -> None:
    _, second = stage_2(trio, layout, ranks, FROZEN)
    _, first = stage_2(trio, layout, ranks, FROZEN, number=1)
    for rank, part in second.items():
        assert part.flops == first[rank].flops, rank
        assert part.collectives == first[rank].collectives, rank
        assert part.peak.get("gradients", 0) == first[rank].peak.get("gradients", 0), rank


def test_beside_one_that_trains_the_frozen_run_forward_alone(trio: Path) -> None:
    layout, mixed = stage_2(trio, DISJOINT_3, 3, {"code": "lora", "text": "frozen", "math": "frozen"})
    _, alone = stage_2(trio, DISJOINT_3, 3, FROZEN)
    _, whole = stage_2(trio, DISJOINT_3, 3, {})
    for rank, part in mixed.items():
        (name,) = layout.specialists_on(rank)
        attention = {one: parts[rank].flops["attention"] for one, parts in (("frozen", alone), ("whole", whole))}
        assert part.flops["attention"] == attention["whole" if name == "code" else "frozen"], name
        trained = part.peak.get("gradients", 0) + part.peak.get("optimizer", 0)
        if name != "code":  # its share of heads and gate, but for which it has none
            assert trained < 0.5 * (whole[rank].peak["gradients"] + whole[rank].peak["optimizer"]), name
