"""The same 5 steps from the same weights and data give the same losses and weights in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trio import (
    COLOCATED_TP2,
    COLOCATED_TP2_PP2,
    COLOCATED_TP4,
    CPU,
    DISJOINT_3,
    DISJOINT_6,
    DISJOINT_8,
    DISJOINT_CODE_TP4,
    ONE,
    config_tree,
    read_steps,
    train,
)

from ultrafuser_mega.checkpoint.checkpoint import Progress, list_checkpoints, load_checkpoint
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.trainer import build_model

TOLERANCE = 1e-4  # of losses and gradient norms, relative; of weights, absolute


def _tree(trio: Path, runs: Path, layout: dict[str, Any], parallel: dict[str, bool]) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout) | {"parallel": parallel, "microbatch_tokens": 320}
    tree["stage1"] |= {"steps": 2}
    tree["stage2"] |= {"steps": 3}
    # Below eps AdamW's step is proportional to the gradient, above it is lr whatever the size. Some embeddings have
    # gradients of 1e-8 here, all of them rounding: with the usual eps they would move by lr in one layout's direction.
    tree["optimizer"] = {"eps": 1e-6}
    return tree


@pytest.fixture(scope="module")
def one_rank(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Steps and last weights of the run that everything else is compared with."""
    tree = _tree(trio, tmp_path_factory.mktemp("one"), ONE, {})
    return read_steps(train(tree, 1)), _final_weights(tree)


@pytest.mark.parametrize(
    ("layout", "ranks", "parallel"),
    [
        pytest.param(COLOCATED_TP2, 2, {}, id="colocated_tp2", marks=pytest.mark.slow),
        pytest.param(COLOCATED_TP2_PP2, 4, {"sequence_parallel": True}, id="colocated_tp2_pp2_sequence_parallel"),
        pytest.param({**ONE, "dp": 5}, 5, {}, id="replicas_that_do_not_divide_the_batch"),
        pytest.param(
            DISJOINT_6, 6, {"sequence_parallel": True}, id="disjoint_2_2_2_sequence_parallel", marks=pytest.mark.slow
        ),
        pytest.param(DISJOINT_8, 8, {}, id="the_default_8_ranks"),
        pytest.param(
            DISJOINT_8,
            8,
            {"sequence_parallel": True},
            id="the_default_8_ranks_sequence_parallel",
            marks=pytest.mark.slow,
        ),
        pytest.param({**DISJOINT_3, "dp": 2}, 6, {"distributed_optimizer": True}, id="dp2_distributed_optimizer"),
        pytest.param(DISJOINT_CODE_TP4, 6, {"sequence_parallel": True}, id="disjoint_shared_key_value_heads"),
        pytest.param(
            {**COLOCATED_TP4, "dp": 2},
            8,
            {"sequence_parallel": True, "distributed_optimizer": True},
            id="colocated_shared_key_value_heads_dp2_distributed_optimizer",
        ),
    ],
)
def test_training_does_not_depend_on_the_layout(
    trio: Path, one_rank: Any, tmp_path: Path, layout: dict[str, Any], ranks: int, parallel: dict[str, bool]
) -> None:
    """The slow ones have quick twins: of tp 2 alone in test_families.py (learn the same), of disjoint layouts under
    sequence parallelism in test_gradients_against_reference.py.
    """
    tree = _tree(trio, tmp_path, layout, parallel)
    here, (there, reference) = read_steps(train(tree, ranks)), one_rank
    assert [step["step"] for step in here] == list(range(1, 6))
    for mine, theirs in zip(here, there, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE)
        assert mine["lr"] == theirs["lr"]
    ours = _final_weights(tree)
    assert ours.keys() == reference.keys()
    differences = {name: (ours[name] - reference[name]).abs().max().item() for name in ours}
    assert {name: d for name, d in differences.items() if d > TOLERANCE} == {}


def _final_weights(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint, read by a single rank whatever wrote them."""
    (weights,) = run_ranks(_load_on_one_rank, 1, tree)
    return weights


def _load_on_one_rank(rank: int, tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    plan = preflight(FuserConfig.model_validate({**tree, "layouts": [ONE]}), 1, resume=False)
    groups = make_groups(plan.layout)
    model = build_model(plan, groups, CPU)
    progress, path = list_checkpoints(plan.config.run_dir / "checkpoints")[-1]
    assert progress == Progress(2, plan.config.stage2.steps)
    load_checkpoint(path, model, groups, None, 0)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
