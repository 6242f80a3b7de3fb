"""``plan`` predicts by arithmetic what a dry run counts: the two must agree at the sizes that matter."""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_cuda_worker import on_fake_cuda
from trio_13b import two_layers

from ultrafuser_mega.dry_run.formula import predictions
from ultrafuser_mega.planning.host_memory import host_memory
from ultrafuser_mega.reporting.rehearsal import Rehearsal

ADAPTERS: dict[str, Any] = {
    "lora": {"rank": 32, "targets": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
    "stage2": {
        "steps": 10,
        "samples_per_class": 32,
        "lr": 1e-4,
        "train": {"heads": "frozen", "specialists": "lora", "math": "frozen"},
    },
}
CASES: dict[str, dict[str, Any]] = {
    "tp 8, dp 2": {"layout": {"kind": "colocated", "tp": 8, "dp": 2}, "changes": {"microbatch_tokens": 2048}},
    "tp 4, pp 2, recomputed": {
        "layout": {"kind": "colocated", "tp": 4, "pp": 2},
        "changes": {"microbatch_tokens": 2048, "parallel": {"sequence_parallel": True, "recompute_layers": "all"}},
    },
    "adapters, one specialist frozen": {
        "layout": {"kind": "colocated", "tp": 4},
        "changes": {"microbatch_tokens": 2048, **ADAPTERS},
    },
    "adapters, tp 8": {"layout": {"kind": "colocated", "tp": 8}, "changes": {"microbatch_tokens": 2048, **ADAPTERS}},
    "adapters in a pipeline": {
        "layout": {"kind": "colocated", "tp": 4, "pp": 2},
        "changes": {"microbatch_tokens": 2048, **ADAPTERS},
    },
    "adapters, disjoint": {
        "layout": {"kind": "disjoint", "specialists": {"text": {"tp": 4}, "code": {"tp": 4}, "math": {"tp": 8}}},
        "changes": {"microbatch_tokens": 4096, **ADAPTERS},
    },
    "state on the host": {
        "layout": {"kind": "colocated", "tp": 8},
        "changes": {"microbatch_tokens": 2048, "optimizer": {"state": "host"}},
    },
    "disjoint": {
        "layout": {"kind": "disjoint", "specialists": {"text": {"tp": 4}, "code": {"tp": 4}, "math": {"tp": 8}}},
        "changes": {"microbatch_tokens": 4096},
    },
}


@pytest.fixture(scope="module")
def rehearsals() -> dict[str, list[Rehearsal]]:
    return dict(zip(CASES, on_fake_cuda(list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_peak_and_flops_of_a_13b_trio_are_predicted(rehearsals: dict[str, list[Rehearsal]], name: str) -> None:
    plan = two_layers(CASES[name]["layout"], **CASES[name]["changes"])
    for rehearsal in rehearsals[name]:
        predicted = predictions(plan, rehearsal, "cuda")
        for part in rehearsal.parts:
            where = f"{part.name} of rank {rehearsal.rank}"
            if part.microbatches:
                assert predicted[rehearsal.rank, part.name].flops == pytest.approx(sum(part.flops.values()), 0.01), (
                    where
                )
            if part.name != "evaluation":
                assert predicted[rehearsal.rank, part.name].peak == pytest.approx(part.peak_bytes, 0.05), where


def test_state_on_the_host_is_there_and_not_on_the_device(rehearsals: dict[str, list[Rehearsal]]) -> None:
    case = CASES["state on the host"]
    plan = two_layers(case["layout"], **case["changes"])
    needed = host_memory(plan)
    assert needed is not None
    (rehearsal,) = rehearsals["state on the host"]
    parts = {part.name: part for part in rehearsal.parts}
    assert parts["stage 2"].host == pytest.approx(needed.state, 0.01)
    saved = parts["checkpoint"].host  # its copies are pinned as far as they come from the device
    assert needed.state + parts["checkpoint"].peak["weights"] <= 1.01 * saved <= 1.01 * (needed.state + needed.save)
    assert all(part.peak.get("optimizer", 0) < 1e-4 * needed.state for part in rehearsal.parts)
