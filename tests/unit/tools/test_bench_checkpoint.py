"""What bench_checkpoint.py makes of its measurements, and checkpoint_bytes.py of its ranks; neither is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.scripts import script

from ultrafuser_mega.planning.preflight import RunPlan

PUBLISHED = Path(__file__).parents[3] / "docs" / "benchmarks"


def test_lost_is_what_a_window_takes_longer_than_as_many_steps_of_its_round() -> None:
    bench = script("bench_checkpoint")

    def of(whole: float, until_done: float | None = None, steps: int = 3) -> dict[str, float]:
        done = {"until_done": until_done or whole, "steps_until_done": steps}
        return {"save": 0.5, "whole": whole, "cpu": whole / 2, "own_cpu": whole / 4} | done

    found = bench.losses(
        {
            bench.NONE: [of(3.0), of(6.0)],
            bench.WAITED_FOR: [of(13.0), of(26.0)],
            bench.IN_BACKGROUND: [of(4.0, 7.0, 5), of(8.0)],
        }
    )
    assert found["step"] == {"median": 1.5, "least": 1.0, "most": 2.0}
    assert found["lost"][bench.WAITED_FOR] == {"median": 15.0, "least": 10.0, "most": 20.0}
    assert found["lost"][bench.IN_BACKGROUND] == {"median": 1.5, "least": 1.0, "most": 2.0}
    assert found["cpu"]["of a save"]["most"] == 10.0 and found["cpu"]["of it training's thread"]["least"] == 0.25
    assert found["ratio"]["median"] == pytest.approx(0.1)
    assert found["ratio_until_done"]["most"] == pytest.approx(0.2)  # two steps more, of a second each, took three


def test_the_largest_share_is_held_against_the_mean_of_all_ranks() -> None:
    rows = [{"bytes": 90, "collectives": []}, {"bytes": 110, "collectives": ["all_gather over dp"]}]
    found = script("checkpoint_bytes").summary(rows, whole=400, ranks=4)
    assert found["most_over_mean"] == 1.1 and found["least_over_mean"] == 0.9
    assert found["collectives"] == ["all_gather over dp"]


def test_ranks_at_both_ends_of_tensor_parallel_groups_are_played_in_the_first_and_the_last_replica() -> None:
    plan: RunPlan = script("trio_13b").plan_13b({"kind": "colocated", "tp": 8, "pp": 2, "dp": 3})
    assert list(script("checkpoint_bytes").ends(plan)) == [0, 7, 8, 15, 32, 39, 40, 47]


def test_published_shares_are_even_and_nothing_of_a_save_is_gathered() -> None:
    found = json.loads((PUBLISHED / "checkpoint_bytes.json").read_text())
    assert found["most_over_mean"] < 1.05 and found["collectives"] == []
