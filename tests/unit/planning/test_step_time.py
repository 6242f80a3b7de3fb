"""What a predicted step follows from; no digit of it is asserted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trio_13b import ROWS, plan_13b

from ultrafuser_mega.planning.cost import Program, rank_cost
from ultrafuser_mega.planning.hardware import GPUS, Assumptions, Cluster
from ultrafuser_mega.planning.microbatch import GlobalBatch, Microbatch, Workload
from ultrafuser_mega.planning.roles import distinct_ranks
from ultrafuser_mega.planning.step_time import StepEstimate, estimate

H100 = Cluster(GPUS["h100-80g"])
TP8_DP2 = {"kind": "colocated", "tp": 8, "dp": 2}


def work(samples: int = 96, length: int = 2048, microbatch_tokens: int = 4096, longer: float = 1.0) -> Workload:
    """Equal samples, of which math's prompts may be longer."""
    lengths = {name: np.full(samples, int(length * (longer if name == "math" else 1))) for name in ROWS}
    return Workload((GlobalBatch(lengths, np.full(samples, length // 2)),), microbatch_tokens, "")


def predicted(layout: dict[str, Any], batch: Workload, cluster: Cluster = H100, **options: Any) -> StepEstimate:
    return estimate(plan_13b(layout), batch, cluster, **options)


def test_parts_make_up_the_step() -> None:
    step = predicted(TP8_DP2, work())
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert all(seconds >= 0 for seconds in step.parts.values())
    assert 0 < step.mfu < H100.assumed.gemm


@pytest.mark.parametrize(
    "faster",
    [
        Cluster(replace(GPUS["h100-80g"], flops=2e15)),
        Cluster(replace(GPUS["h100-80g"], bandwidth=5e12)),
        Cluster(replace(GPUS["h100-80g"], node_bandwidth=900e9)),
        Cluster(replace(GPUS["h100-80g"], network_bandwidth=100e9)),
        Cluster(GPUS["h100-80g"], assumed=Assumptions(latency=1e-6)),
    ],
    ids=["products", "memory", "links", "network", "latency"],
)
def test_everything_that_a_gpu_does_faster_shortens_the_step(faster: Cluster) -> None:
    assert predicted(TP8_DP2, work(), faster).seconds < predicted(TP8_DP2, work()).seconds


@pytest.mark.parametrize(
    "saving", ["fused_nodes", "fused_weight_gradients", "gradient_overlap", "weight_overlap", "tensor_overlap"]
)
def test_every_saving_shortens_the_step(saving: str) -> None:
    bare = Program(fused_nodes=False, fused_weight_gradients=False, gradient_overlap=False, weight_overlap=False)
    less = predicted(TP8_DP2, work(), program=replace(bare, **{saving: True}))
    assert less.seconds < predicted(TP8_DP2, work(), program=bare).seconds


def test_one_replica_without_pipeline_waits_for_nobody() -> None:
    assert predicted({"kind": "colocated", "tp": 8}, work()).idle == pytest.approx(0)


def test_a_pipeline_waits_while_it_fills_and_empties() -> None:
    """48 microbatches, 4 stages: 3 in 51 parts. Stages differ by heads and embeddings, which is little."""
    step = predicted({"kind": "colocated", "tp": 8, "pp": 4}, work())
    assert step.idle == pytest.approx(3 / 51, abs=0.03)
    assert step.idle > 3 / 51


def test_specialists_on_unequal_ranks_leave_half_of_the_ranks_idle_for_half_of_the_time() -> None:
    """tp 4, 4 and 8 for three equal models: products of a microbatch are as 2 to 1."""
    layout = {"kind": "disjoint", "specialists": {"text": {"tp": 4}, "code": {"tp": 4}, "math": {"tp": 8}}}
    plan = plan_13b(layout)
    microbatch = Microbatch.alike(list(ROWS), 2048, 1024)
    text, code, math = (rank_cost(plan, rank, microbatch).products["layers"] for rank in distinct_ranks(plan))
    assert text == code == pytest.approx(2 * math)
    assert 0.15 < predicted(layout, work(length=2000)).idle < 0.25  # what does not shrink with tp takes away from it


def test_a_specialist_with_longer_prompts_is_waited_for() -> None:
    layout = {"kind": "disjoint", "specialists": {key: {"tp": 8} for key in ROWS}}
    assert predicted(layout, work(length=1800)).idle == pytest.approx(0, abs=1e-3)
    longer = predicted(layout, work(length=1800, longer=1.08)).idle
    assert longer == pytest.approx(2 / 3 * (1 - 1 / 1.08), abs=0.02)


def test_replicas_without_samples_are_idle() -> None:
    assert predicted({"kind": "colocated", "tp": 8, "dp": 8}, work(samples=6)).idle == pytest.approx(2 / 8)


def test_small_microbatches_wait_for_the_host() -> None:
    parts = predicted(TP8_DP2, work(length=64, microbatch_tokens=64)).parts
    assert max(parts, key=parts.__getitem__) == "host"


def test_a_group_within_a_node_travels_faster_than_one_across() -> None:
    assert H100.bus(8, 1) > H100.bus(16, 16)
    assert H100.bus(16, 2) == min(H100.bus(8, 1), 8 * H100.bus(2, 2))
