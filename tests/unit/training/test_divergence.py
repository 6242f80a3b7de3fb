"""When weights count as ruined, and what is then advised."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ultrafuser_mega.data.batches import Packing, StepBatch
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import plan_colocated
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.divergence import SAMPLES, Judge, measured_batches, measured_loss, remedy


def test_training_that_gets_better_or_a_little_worse_is_accepted() -> None:
    judge = Judge(3.0)
    assert [judge.accepts(loss) for loss in (2.5, 1.0, 1.6, 1.2)] == [True] * 4


def test_half_of_every_tokens_probability_is_the_limit() -> None:
    assert Judge(1.0).accepts(1.0 + 0.999 * math.log(2))
    assert not Judge(1.0).accepts(1.0 + 1.001 * math.log(2))


def test_the_limit_does_not_climb_along_with_the_loss() -> None:
    judge = Judge(1.0)
    assert judge.accepts(1.5)
    assert not judge.accepts(2.0)
    assert judge.accepts(1.5)


def _batches(samples: int) -> Any:
    """Of steps of so many samples, in two microbatches that only say where they come from."""

    def step(step: int) -> StepBatch:
        microbatches: Any = [(step, 0), (step, 1)]
        return StepBatch(microbatches, {}, np.ones(samples), Packing(0.0, 1.0, 1.0))

    return SimpleNamespace(step=step)


@pytest.mark.parametrize(("samples", "steps"), [(SAMPLES, 1), (SAMPLES - 1, 2), (3, 22)])
def test_weights_are_measured_on_as_many_of_the_first_batches_as_hold_64_samples(samples: int, steps: int) -> None:
    found: list[Any] = measured_batches(_batches(samples), 1000)
    assert found == [(step, half) for step in range(steps) for half in (0, 1)]


def test_a_shorter_stage_is_measured_on_all_of_its_batches() -> None:
    assert len(measured_batches(_batches(3), 4)) == 8


def test_a_class_of_few_tokens_weighs_no_more_than_these_in_the_measured_loss() -> None:
    """A response of one word that the model unlearns must not look like ruin."""
    (loss,) = run_ranks(_measure, 1)
    assert loss == pytest.approx((99 * 2.0 + 6.0) / 100, rel=1e-12)


def _measure(rank: int) -> float:
    def loss(hidden: object, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return losses.sum(), losses, None

    def forward(microbatches: Any, measure: Any) -> None:
        for batch in microbatches:
            measure({}, batch)

    fusion = SimpleNamespace(loss=loss)
    model = SimpleNamespace(fusion=fusion, exchange=lambda hidden: hidden)
    groups = make_groups(plan_colocated(["a", "b"], tp=1, pp=1, dp=1))
    engine: Any = SimpleNamespace(model=model, device=torch.device("cpu"), groups=groups, forward=forward)
    one_word = SimpleNamespace(row_class=torch.tensor([0]), targets=torch.tensor([6.0]))
    long = SimpleNamespace(row_class=torch.ones(99, dtype=torch.int64), targets=torch.full((99,), 2.0))
    microbatches: Any = [one_word, long]
    return measured_loss(engine, ["text", "code"], microbatches)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_accepted(loss: float) -> None:
    assert not Judge(1.0).accepts(loss)


def test_specialists_that_are_sure_of_themselves_may_begin_above_uniform_guessing() -> None:
    assert Judge(9.5).accepts(9.6)  # ln(1536) is 7.3


def test_advice_names_the_newest_checkpoint_there_is(tmp_path: Path) -> None:
    assert remedy(tmp_path).startswith("no checkpoint was written before it: start afresh")
    for name in ("stage1-step0000400", "stage2-step0000050", ".stage2-step0000100.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "progress.json").write_text("{}")
    assert remedy(tmp_path) == (
        "the last good checkpoint is stage2-step0000050: --resume goes on from it, with a smaller lr"
    )
