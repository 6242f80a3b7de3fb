"""Layouts for a number of GPUs: which are tried, which fit, and what is said of the others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trio_13b import ROWS, plan_13b

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.advice import advise, short
from ultrafuser_mega.planning.hardware import GPUS, Cluster, named_gpu
from ultrafuser_mega.planning.host_memory import check_host_memory, host_memory
from ultrafuser_mega.planning.layouts import layout_entry, layouts_for, ranked, worthwhile
from ultrafuser_mega.planning.microbatch import GlobalBatch, Workload
from ultrafuser_mega.planning.preflight import plan_layouts
from ultrafuser_mega.planning.step_time import estimate

H100 = Cluster(GPUS["h100-80g"])
ANY = {"kind": "colocated"}


def work(microbatch_tokens: int = 8192) -> Workload:
    lengths = dict.fromkeys(ROWS, np.full(96, 2048))
    return Workload((GlobalBatch(lengths, np.full(96, 1536)),), microbatch_tokens, "")


def names(gpus: int, per_node: int = 8) -> list[str]:
    return [short(layout) for layout in layouts_for(plan_13b(ANY), gpus, Cluster(GPUS["h100-80g"], per_node))]


def test_every_layout_takes_all_gpus_keeps_tp_in_a_node_and_divides_the_heads() -> None:
    found = layouts_for(plan_13b(ANY), 16, H100)
    assert found
    for layout in found:
        assert layout.world_size == 16
        assert {placement.tp for placement in layout.placements.values()} <= {1, 2, 4, 8}
    assert {"colocated tp 8 dp 2", "colocated tp 8 pp 2", "disjoint 4 + 4 + 8"} <= set(names(16))


def test_equal_specialists_are_not_permuted() -> None:
    assert "disjoint 8 + 4 + 4" not in names(16)


def test_tp_stays_within_smaller_nodes() -> None:
    found = layouts_for(plan_13b(ANY), 16, Cluster(GPUS["h100-80g"], 4))
    assert max(placement.tp for layout in found for placement in layout.placements.values()) == 4


def test_groups_that_would_cross_a_node_are_left_out() -> None:
    """Of 12 ranks a third specialist on ranks 4-11 would lie in two nodes."""
    assert not [name for name in names(12) if name.startswith("disjoint 2 + 2 + 8")]


def test_layouts_that_leave_most_ranks_idle_are_not_considered() -> None:
    """A third of the work on less than a sixth of the ranks would take more than twice as long as it could."""
    for layout in layouts_for(plan_13b(ANY), 16, H100):
        if layout.kind == "disjoint":
            assert all(len(placement.ranks) * 6 >= layout.replica_size for placement in layout.placements.values())


@pytest.mark.parametrize("gpus", [8, 16, 24])
def test_fitting_layouts_come_first_and_the_fastest_of_them_first(gpus: int) -> None:
    found = ranked(plan_13b(ANY), work(), H100, gpus)
    order = [(not one.fits, not one.usable, one.step.seconds if one.usable else one.needed) for one in found]
    assert order == sorted(order)
    for one in found:
        assert one.fits == (one.needed <= H100.room)
        assert (one.short_of is None) == one.fits
        if one.usable:
            assert one.step.memory.peak <= H100.room


def test_three_13b_models_fit_eight_gpus_with_what_the_optimizer_holds_on_the_host_alone() -> None:
    found = ranked(plan_13b(ANY), work(), H100, 8)
    assert not any(one.fits for one in found)
    assert {one.remedy for one in found} == {"optimizer.state=host", None}
    assert all("more tp, pp or dp" in str(one.short_of) for one in found if not one.usable)
    kept = ranked(plan_13b(ANY, optimizer={"state": "host"}), work(), H100, 8)
    assert kept[0].fits and kept[0].plan.layout == found[0].plan.layout
    lines = "\n".join(advise(plan_13b(ANY), H100, 8).lines)
    assert "layouts:   with optimizer.state=host" in lines
    assert re.search(r"optimizer\.state: host takes 5\d\.\d GiB of host memory a rank, 4\d\d\.\d GiB for 8 of", lines)


def test_a_machine_with_too_little_memory_for_the_state_is_refused() -> None:
    plan = plan_13b({"kind": "colocated", "tp": 8}, optimizer={"state": "host"})
    needed = host_memory(plan)
    assert needed is not None
    check_host_memory(plan, 8, 8 * (needed.state + needed.save))
    with pytest.raises(
        InputError,
        match=r"^optimizer\.state: host takes 54\.6 GiB of host memory a rank, 436\.8 GiB for 8 of a node; 509\.6 GiB "
        r"more while a checkpoint is written, and 900\.0 GiB of this machine are free; take more nodes",
    ):
        check_host_memory(plan, 8, 900 * 2**30)
    check_host_memory(plan_13b({"kind": "colocated", "tp": 8}), 8, 0)


def test_state_from_the_host_takes_the_step_its_way_over_the_link_or_through_the_nodes_memory() -> None:
    layout = {"kind": "colocated", "tp": 8}
    batch, state = work(), 54.5978307723999 * 2**30
    there = estimate(plan_13b(layout), batch, H100)
    for cluster in (H100, Cluster(replace(H100.gpu, host_bandwidth=1e9))):
        step = estimate(plan_13b(layout, optimizer={"state": "host"}), batch, cluster)
        link = state / (cluster.gpu.host_bandwidth * cluster.assumed.pcie)
        assert step.seconds - there.seconds == pytest.approx(max(link, 16 * state / cluster.assumed.host_memory))


def test_remedy_recomputes_no_more_layers_than_it_takes() -> None:
    """Pipelines of two stages on 16 GPUs keep two microbatches of 16384 tokens: more than fits."""
    (found,) = (one for one in ranked(plan_13b(ANY), work(16384), H100, 16) if short(one.plan.layout).endswith("pp 2"))
    assert not found.fits
    assert found.remedy is not None
    key, count = found.remedy.split("=")
    assert key == "parallel.recompute_layers"
    assert found.plan.config.parallel.recompute_layers == int(count) < 20


def test_settings_that_cost_no_time_are_named_before_those_that_do() -> None:
    plan = plan_13b(ANY, parallel={})
    found = {short(one.plan.layout): one for one in ranked(plan, work(), H100, 16)}
    assert found["colocated tp 8 pp 2"].remedy == "parallel.sequence_parallel=true"


@pytest.mark.parametrize(
    ("seconds", "fewer", "count"),
    [
        (1.0, [(32, 2.0), (16, 4.0)], 64),
        (1.0, [(32, 1.4), (16, 2.4)], 32),
        (1.0, [(32, 1.1), (16, 1.2)], 16),
        (1.0, [], 64),
    ],
)
def test_gpus_that_gain_less_than_half_again_are_too_many(
    seconds: float, fewer: list[tuple[int, float]], count: int
) -> None:
    assert worthwhile(64, seconds, fewer) == count


@pytest.mark.parametrize("gpus", [16, 48])
def test_entries_are_what_the_configuration_reads(gpus: int) -> None:
    plan = plan_13b(ANY)
    for layout in layouts_for(plan, gpus, H100):
        tree = plan.config.model_dump(mode="json") | {"layouts": [layout_entry(layout)]}
        assert plan_layouts(FuserConfig.model_validate(tree)) == [layout]


def test_advice_says_where_token_counts_are_from_and_what_was_not_checked(tmp_path: Path) -> None:
    advice = advise(plan_13b(ANY, runs=str(tmp_path)), H100, 24)
    text = "\n".join(advice.lines)
    assert "assumed, no data prepared: every sample has data.max_length = 2048 tokens" in text
    assert "not checked: weights, tokenizers, data" in text
    assert "layouts:\n  - {kind: " in text
    assert len(advice.rows) <= 8


def test_unknown_gpus_are_refused_with_those_known() -> None:
    with pytest.raises(InputError, match="--gpu h100: not known; one of a100-40g, a100-80g, h100-80g"):
        named_gpu("h100")


def test_shared_key_value_heads_follow_the_program() -> None:
    """Whatever tp the program accepts is tried."""
    plan = plan_13b(ANY)
    archs: dict[str, Any] = {name: replace(arch, kv_heads=8) for name, arch in plan.architectures.items()}
    found = layouts_for(replace(plan, architectures=archs), 16, H100)
    assert {placement.tp for layout in found for placement in layout.placements.values()} >= {1, 2, 4, 8}
