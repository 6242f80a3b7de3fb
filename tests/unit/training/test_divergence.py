"""When weights count as ruined, and what is then advised."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ultrafuser_mega.training.divergence import Judge, remedy


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
