"""What all ranks measured becomes one step's numbers: means, worst ranks, and who waited for whom."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from trio_13b import plan_13b

from ultrafuser_mega.data.batches import Packing, StepBatch
from ultrafuser_mega.planning.hardware import peak_flops
from ultrafuser_mega.reporting.records import StepRecord
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.trainable import Rates
from ultrafuser_mega.training.measures import Measured, Measures
from ultrafuser_mega.training.totals import Totals

CPU = torch.device("cpu")
DISJOINT = {"kind": "disjoint", "specialists": {"text": {}, "code": {}, "math": {"pp": 2}}}  # ranks 0, 1, 2 -> 3

BATCH = StepBatch(
    [],
    dict.fromkeys(("text", "code", "math"), np.array([1000, 1000])),
    np.array([500, 500]),
    Packing(0.0, 1.0, 1.0),
)


class Seconds(Phases):
    """Phases of a step that took as long as told."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self.seconds = seconds

    def of_last_step(self) -> dict[str, float]:
        return self.seconds


def measured(seconds: list[dict[str, float]], norms: list[float]) -> Measured:
    """What ranks of DISJOINT find together."""
    plan = plan_13b(DISJOINT)
    said = [
        Measures(plan, CPU, Seconds(own), None).own(torch.tensor(norm), 0.1 * norm, norm).numpy()
        for own, norm in zip(seconds, norms, strict=True)
    ]
    return Measures(plan, CPU, Phases(), None).read(np.stack(said), BATCH)


def test_a_phase_has_its_mean_over_the_ranks_that_were_in_it_and_its_worst_rank() -> None:
    found = measured([{"forward of text": 1.0, "loss": 0.5}, {"loss": 1.5}, {}, {"loss": 1.0}], [1.0] * 4)
    assert found.phases["forward_of_text"] == {"mean": 1.0, "worst": 1.0}
    assert found.phases["loss"] == {"mean": 1.0, "worst": 1.5}
    assert "forward_of_code" not in found.phases


def test_who_came_last_to_an_exchange_waited_for_nobody_and_the_others_were_idle() -> None:
    found = measured(
        [{"exchange": 0.5}, {"exchange": 0.2}, {"pipeline transfer": 0.6, "end of step": 0.1}, {"exchange": 0.3}],
        [1.0] * 4,
    )
    assert found.phases["exchange"] == {"mean": pytest.approx(0.2), "worst": pytest.approx(0.2)}
    # 0.3 and 0.1 of ranks 0 and 3; nothing of rank 1, which counts as not idle; 0.7 of rank 2, before the last stage
    assert found.phases["idle"] == {"mean": pytest.approx(1.1 / 3), "worst": pytest.approx(0.7)}


def test_the_largest_of_all_ranks_is_taken_and_a_norm_that_is_not_finite_stays_so() -> None:
    found = measured([{}] * 4, [1.0, 3.0, 2.0, 0.0])
    assert found.grad_norm == found.wanted == 3.0 and found.data_seconds == pytest.approx(0.3)
    assert found.memory_bytes > 2**20 and found.peak_memory_bytes > 2**20
    assert math.isnan(measured([{}] * 4, [1.0, math.nan, 2.0, 0.0]).grad_norm)
    assert found.phases == {}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 PCIe", "bf16", None),
        ("NVIDIA GB200", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_only_a_gpu_whose_products_are_known_has_a_peak(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak


def record_of(peak: float | None) -> StepRecord:
    none = Measured(1.0, 0.0, 1, 1, 0.0, {})
    totals, rates = Totals({}, {}, np.zeros(0)), Rates(1.0, 1.0, {})
    return Measures(plan_13b(DISJOINT), CPU, Phases(), peak).record(
        none, totals, BATCH, stage=2, step=1, loss=1.0, rates=rates, seconds=2.0, skipped=False
    )


def test_utilisation_is_the_models_flops_in_parts_of_all_gpus_peak() -> None:
    """6 per weight and token, the heads and the gate on response tokens: 13B Llamas have 12.7e9 weights in layers."""
    layers = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    flops = 3 * (6 * 2000 * layers + 6 * 2 * 1000**2 * 40 * 5120 + 6 * 1000 * 5120 * (32000 + 5120))
    assert record_of(1e15).mfu == pytest.approx(flops / (4 * 1e15 * 2.0))
    assert math.isnan(record_of(None).mfu)
