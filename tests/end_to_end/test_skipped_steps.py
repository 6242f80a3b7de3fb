"""Steps without a number: skipped, written down, gone back for, and only in the end the end of the run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trio import CPU, ONE, config_tree, draw_nothing, read_steps
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.errors import DivergedError
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.runtime.trainable import Rates, Trainable
from ultrafuser_mega.training.run import run


@pytest.fixture
def tree(trio: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of 2 and 4 steps on one rank, with a checkpoint of each."""
    tree = config_tree(trio, tmp_path / "runs", ONE)
    tree["stage2"] |= {"steps": 4}
    tree["checkpoint"] = {"every": 1, "keep": 9}
    return tree


@pytest.fixture(scope="module")
def undisturbed(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of such a run in which nothing happens."""
    tree = config_tree(trio, tmp_path_factory.mktemp("undisturbed"), ONE)
    tree["stage2"] |= {"steps": 4}
    run_ranks(_train, 1, tree, (), timeout_s=120)
    return [step["loss"] for step in read_steps(FuserConfig.model_validate(tree).run_dir)]


def _train(rank: int, tree: dict[str, Any], broken: tuple[int, ...], resume: bool = False) -> str | None:
    """Run it; the gradients of the updates ``broken``, counted as they are tried, are nan. What diverged, if it did."""
    draw_nothing()
    real, tried = Trainable.clip_gradients, iter(range(10_000))

    def clip_gradients(self: Trainable) -> Tensor:
        if next(tried) in broken:
            self.wrapped.buffers[0].grad_data.fill_(math.nan)
        return real(self)

    Trainable.clip_gradients = clip_gradients  # type: ignore[method-assign]
    try:
        run(preflight(FuserConfig.model_validate(tree), 1, resume), CPU)
    except DivergedError as error:
        return str(error)
    return None


def test_step_without_a_finite_gradient_is_skipped_and_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    tree: dict[str, Any], undisturbed: list[float]
) -> None:
    assert run_ranks(_train, 1, tree, (3,), timeout_s=120) == [None]
    run_dir = FuserConfig.model_validate(tree).run_dir
    steps = read_steps(run_dir)
    assert [step["skipped"] for step in steps] == [False, False, False, True, False, False]
    assert [step["loss"] for step in steps[:4]] == undisturbed[:4]  # nothing of the skipped step's own loss is lost
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert steps[4]["loss"] != undisturbed[4]

    (line,) = map(json.loads, (run_dir / "skipped.jsonl").read_text().splitlines())
    assert (line["stage"], line["step"], line["grad_norm"]) == (2, 4, "nan")
    assert [name for name, _ in line["samples"]] == ["text"] * 2 + ["code"] * 2 + ["math"] * 2

    behind = {progress.folder: path for progress, path in list_checkpoints(run_dir / "checkpoints")}
    # None of the skipped step itself: had the next been skipped too, the run would not have gone back far enough.
    assert sorted(behind) == ["stage1-step0000001", "stage1-step0000002", *(f"stage2-step000000{k}" for k in (1, 3, 4))]
    shutil.rmtree(behind["stage2-step0000004"])
    assert run_ranks(_train, 1, tree, (), True, timeout_s=120) == [None]
    assert [step["loss"] for step in read_steps(run_dir)] == [step["loss"] for step in steps]


def test_what_a_skipped_step_leaves_is_untouched(tree: dict[str, Any]) -> None:
    before, after = run_ranks(_weights_around_a_skipped_step, 1, tree, timeout_s=120)[0]
    assert before == after


def _weights_around_a_skipped_step(rank: int, tree: dict[str, Any]) -> tuple[float, float]:
    seen: list[float] = []
    real = Trainable.update

    def update(self: Trainable, *, skip: bool) -> Rates:
        rates = real(self, skip=skip)
        held = [
            tensor
            for state in self.optimizer.chained_optimizers[0].optimizer.state.values()
            for tensor in state.values()
        ]
        seen.append(sum(float(torch.hash_tensor(tensor.detach())) for tensor in [*self.parameters, *held]))
        return rates

    Trainable.update = update  # type: ignore[method-assign]
    assert _train(rank, tree, (3,)) is None
    return seen[2], seen[3]


def test_too_many_in_a_row_send_the_run_back_and_what_passes_leaves_no_trace(
    tree: dict[str, Any], undisturbed: list[float]
) -> None:
    tree["faults"] = {"skips": 2}
    assert run_ranks(_train, 1, tree, (3, 4), timeout_s=120) == [None]
    run_dir = FuserConfig.model_validate(tree).run_dir
    assert [step["loss"] for step in read_steps(run_dir)] == undisturbed
    assert len((run_dir / "skipped.jsonl").read_text().splitlines()) == 2


def test_what_comes_again_behind_the_same_checkpoint_ends_the_run(tree: dict[str, Any]) -> None:
    tree["faults"] = {"skips": 1}
    (problem,) = run_ranks(_train, 1, tree, tuple(range(3, 100)), timeout_s=120)
    assert problem.startswith("stage 2 step 2 of 4: loss is ")
    assert "gradient norm nan again; the last good checkpoint is stage2-step0000001: --resume goes on" in problem


def test_a_run_that_cannot_begin_says_so(tree: dict[str, Any]) -> None:
    (problem,) = run_ranks(_train, 1, tree, tuple(range(100)), timeout_s=120)
    assert problem.endswith("no checkpoint was written before it: start afresh with a smaller lr")
