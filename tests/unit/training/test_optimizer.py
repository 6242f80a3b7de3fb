"""The rate of every step of a stage, as the module's own formula and nothing else has it."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any

import pytest

from ultrafuser_mega.config import Stage
from ultrafuser_mega.training.optimizer import NOT_DECAYED, make_schedule


def rates(**stage: Any) -> list[float]:
    """The rate that each step of the stage is done with."""
    return rates_of(stage, {})


def rates_of(stage: dict[str, Any], override: dict[str, float]) -> list[float]:
    """The same, of a group that has something else than the stage."""
    options = Stage.model_validate({"samples_per_class": 1} | stage)
    group = {"lr": None, "max_lr": options.lr, "min_lr": options.min_lr} | override  # as Megatron fills them
    schedule = make_schedule(SimpleNamespace(param_groups=[group]), options, 0.0)
    found = []
    for _ in range(options.steps):
        found.append(group["lr"])
        schedule.step(1)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_step_k_of_a_warm_up_of_n_has_k_nths_of_the_rate(schedule: str) -> None:
    found = rates(steps=20, lr=1.0, warmup_steps=4, schedule=schedule)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_first_step_without_a_warm_up_has_the_whole_rate(warmup: int) -> None:
    assert rates(steps=5, lr=1e-3, warmup_steps=warmup)[0] == 1e-3


def test_a_warm_up_as_long_as_the_stage_ends_at_the_rate() -> None:
    assert rates(steps=4, lr=1.0, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_cosine_falls_from_the_rate_to_one_step_short_of_the_lowest() -> None:
    found = rates(steps=10, lr=1e-3, min_lr=1e-4, warmup_steps=3)
    expected = [1e-4 + 9e-4 * (1 + math.cos(math.pi * (k - 3) / 8)) / 2 for k in range(3, 11)]
    assert found[2:] == pytest.approx(expected)
    assert found[2:] == sorted(found[2:], reverse=True)
    assert found[-1] > 1e-4


def test_a_group_of_another_rate_has_the_same_schedule_in_proportion() -> None:
    for schedule, min_lr in (("cosine", 1e-4), ("constant", 0.0)):
        stage = {"steps": 10, "lr": 1e-3, "min_lr": min_lr, "warmup_steps": 3, "schedule": schedule}
        fast = rates_of(stage, {"max_lr": 3e-2, "min_lr": 30 * min_lr})
        assert fast == pytest.approx([30 * lr for lr in rates_of(stage, {})])


def test_no_step_is_spent_on_a_rate_of_zero() -> None:
    for warmup in (0, 1, 2, 5):
        assert min(rates(steps=5, lr=1e-3, warmup_steps=warmup)) > 0


def test_a_stage_of_no_steps_may_keep_its_warm_up() -> None:
    assert rates(steps=0, lr=1e-3, warmup_steps=5) == []


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("fusion.heads.text", True),
        ("fusion.gate.w1.shared", True),
        ("fusion.gate.w2", True),
        ("fusion.gate.b1", False),
        ("module.b1", False),  # in stage 1 the gate is all that is trained
        ("specialists.text.embedding.word_embeddings.weight", True),
        ("specialists.text.decoder.layers.0.mlp.linear_fc1.weight", True),
        ("specialists.text.decoder.layers.0.self_attention.linear_qkv.bias", False),
        ("specialists.text.decoder.layers.0.self_attention.q_layernorm.weight", False),
        ("specialists.text.decoder.layers.0.input_layernorm.weight", False),
        ("specialists.text.decoder.final_layernorm.weight", False),
    ],
)
def test_matrices_decay_and_biases_and_norms_do_not(name: str, decays: bool) -> None:
    assert any(fnmatch(name, pattern) for pattern in NOT_DECAYED) != decays
