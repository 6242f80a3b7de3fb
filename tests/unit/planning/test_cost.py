"""The plan's arithmetic for three 13B models, against figures that a dry run of the training step counted.

Those are of the step itself, run with tensors that hold nothing, one rank at a time: parameters, products as PyTorch
counts them, and operands of collectives. They do not depend on how the elementwise operations are written.
"""

from __future__ import annotations

import pytest
from trio_13b import plan_13b

from ultrafuser_mega.planning.cost import rank_cost
from ultrafuser_mega.planning.memory import rank_memory
from ultrafuser_mega.planning.microbatch import Microbatch
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import role_of

GIB, TERA, GIGA, MEGA = 2**30, 1e12, 1e9, 1e6
TP8_DP2 = {"kind": "colocated", "tp": 8, "dp": 2}
TP8_PP2 = {"kind": "colocated", "tp": 8, "pp": 2}
DISJOINT_448 = {"kind": "disjoint", "specialists": {"text": {"tp": 4}, "code": {"tp": 4}, "math": {"tp": 8}}}


def one(plan: RunPlan, tokens: int, sequence: int | None = None) -> Microbatch:
    """Three quarters of it response."""
    return Microbatch.alike(list(plan.architectures), tokens, tokens * 3 // 4, sequence)


@pytest.mark.parametrize(
    ("layout", "rank", "weights_and_gradients_and_master", "moments"),
    [
        (TP8_DP2, 0, 36.40, 18.20),
        (TP8_PP2, 8, 22.76, 18.21),
        (DISJOINT_448, 4, 30.23, 24.18),
        ({"kind": "colocated", "tp": 8, "dp": 8}, 63, 29.57, 4.55),
        ({"kind": "colocated", "tp": 8, "pp": 2, "dp": 32}, 511, 13.94, 0.57),
        ({"kind": "colocated", "tp": 8, "dp": 64}, 0, 27.58, 0.57),
    ],
)
def test_memory_between_steps(
    layout: dict[str, object], rank: int, weights_and_gradients_and_master: float, moments: float
) -> None:
    plan = plan_13b(layout)
    memory = rank_memory(plan, rank, one(plan, 2048))
    assert memory.static / GIB == pytest.approx(weights_and_gradients_and_master + moments, abs=0.015)


def test_parameters_of_a_rank_are_exact() -> None:
    assert role_of(plan_13b(TP8_DP2), 0).parameters == 4_885_331_200


def test_saving_takes_nothing_of_a_gpu_and_a_copy_of_the_rank_s_part_on_a_cpu() -> None:
    plan = plan_13b(TP8_DP2)
    on_gpu, on_cpu = (rank_memory(plan, 0, one(plan, 2048), device=device) for device in ("cuda", "cpu"))
    assert (on_gpu.save, on_gpu.phase) == (0, "backward")
    assert on_cpu.save == (2 + 12) * 4_885_331_200 / 2  # weights, their float32 masters and both moments, of half


def test_products_of_a_microbatch() -> None:
    plan = plan_13b(TP8_DP2)
    products = rank_cost(plan, 0, one(plan, 2048)).products
    assert (products["layers"] + products["gate"] / 1.5) / TERA == pytest.approx(58.53, abs=0.015)
    assert products["attention"] / TERA == pytest.approx(3.22 + 1.29, abs=0.01)
    assert products["head"] / TERA == pytest.approx(0.57, abs=0.005)
    assert sum(products.values()) / TERA == pytest.approx(63.63, abs=0.02)


def test_recomputed_layers_run_forward_twice() -> None:
    plan = plan_13b(TP8_DP2, parallel={"sequence_parallel": True, "recompute_layers": "all"})
    assert sum(rank_cost(plan, 0, one(plan, 8192)).products.values()) / TERA == pytest.approx(407.21, rel=1e-3)


def test_products_of_stage_1() -> None:
    plan = plan_13b(TP8_DP2)
    products = rank_cost(plan, 0, one(plan, 2048), stage=1).products
    assert sum(products.values()) / TERA == pytest.approx(21.03, abs=0.02)


def test_bytes_of_collectives() -> None:
    plan = plan_13b(TP8_DP2)
    cost = rank_cost(plan, 0, one(plan, 2048))
    per_microbatch = [traffic for traffic in cost.traffic if traffic.group == "tp" and not traffic.per_step]
    assert sum(traffic.calls for traffic in per_microbatch) == 729 + 483
    assert cost.group_bytes("tp", per_step=False) / MEGA == pytest.approx(15272.509 + 10129.244, abs=1)
    assert cost.group_bytes("tp", per_step=True) / MEGA == pytest.approx(4.977, abs=0.001)
    assert cost.group_bytes("dp", per_step=True) / MEGA == pytest.approx(19541.325 + 9770.662, abs=0.01)
    assert cost.group_bytes("fusion", per_step=False) / MEGA == pytest.approx(94.372 + 0.688 + 0.018, abs=0.001)


def test_bytes_of_collectives_where_layers_are_recomputed() -> None:
    plan = plan_13b(TP8_DP2, parallel={"sequence_parallel": True, "recompute_layers": "all"})
    cost = rank_cost(plan, 0, one(plan, 8192))
    calls = sum(traffic.calls for traffic in cost.traffic if traffic.group == "tp" and not traffic.per_step)
    assert calls == 969 + 723
    assert cost.group_bytes("tp", per_step=False) / MEGA == pytest.approx(81222.697 + 60649.636, abs=2)


def test_bytes_between_pipeline_stages() -> None:
    plan = plan_13b(TP8_PP2)
    cost = rank_cost(plan, 8, one(plan, 2048))
    # Two microbatches: 4 tensors received and 2 sent (the sizes of 2 more were not counted), 15.729 MB each two.
    assert cost.group_bytes("pp", per_step=False) / MEGA == pytest.approx(15.729, abs=0.001)
    assert cost.group_bytes("tp", per_step=False) / MEGA == pytest.approx((15319.695 + 10066.330) / 2, abs=1)
