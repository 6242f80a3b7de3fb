"""`ultrafuser plan` promises what the ranks then hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trio import (
    COLOCATED_TP2_PP2,
    COLOCATED_TP4,
    CPU,
    DISJOINT_8,
    DISJOINT_UNEVEN,
    ONE,
    config_tree,
    write_trio,
)

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.planning.memory import rank_shares
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.plan_table import RankShare
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model

DISJOINT_5 = {"kind": "disjoint", "specialists": {"text": {"tp": 2}, "code": {}, "math": {"tp": 2}}}


@pytest.fixture(scope="module")
def widths_differ(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trio(tmp_path_factory.mktemp("trio"), (64, 48, 96))


def shares(tree: dict[str, Any], ranks: int) -> list[RankShare]:
    return rank_shares(preflight(FuserConfig.model_validate(tree), ranks, resume=False))


def held_parameters(rank: int, tree: dict[str, Any]) -> int:
    plan = preflight(FuserConfig.model_validate(tree), torch.distributed.get_world_size(), resume=False)
    return sum(parameter.numel() for parameter in build_model(plan, make_groups(plan.layout), CPU).parameters())


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param(ONE, 1, id="one_rank"),
        pytest.param(COLOCATED_TP2_PP2, 4, id="colocated_tp2_pp2"),
        pytest.param(DISJOINT_8, 8, id="disjoint_8_ranks"),
        pytest.param(DISJOINT_UNEVEN, 5, id="uneven_stages"),
        pytest.param(COLOCATED_TP4, 4, id="shared_key_value_heads"),
    ],
)
@pytest.mark.parametrize("folder", ["trio", "widths_differ"])
def test_planned_parameters_are_those_of_the_built_model(
    request: pytest.FixtureRequest, tmp_path: Path, folder: str, layout: dict[str, Any], ranks: int
) -> None:
    tree = config_tree(request.getfixturevalue(folder), tmp_path, layout)
    held = run_ranks(held_parameters, ranks, tree)
    assert [share.parameters for share in shares(tree, ranks)] == held


def test_places_and_vocabulary_rows_of_the_default_layout(trio: Path, tmp_path: Path) -> None:
    found = shares(config_tree(trio, tmp_path, DISJOINT_8), 8)
    assert [share.rank for share in found] == list(range(8))
    assert [share.specialists for share in found] == [("text",)] * 2 + [("code",)] * 2 + [("math",)] * 4
    assert [share.tensor for share in found] == [(0, 2), (1, 2)] * 4
    assert [share.stage for share in found] == [(0, 1)] * 4 + [(0, 2)] * 2 + [(1, 2)] * 2
    # 400 shared rows over 6 ranks, in multiples of 8: 72 each, 40 on the last.
    ends = [(0, 72), (72, 144), (144, 216), (216, 288), None, None, (288, 360), (360, 400)]
    assert [share.vocabulary_rows for share in found] == [ends and range(*ends) for ends in ends]


def test_rank_whose_vocabulary_rows_are_all_padding_has_none(trio: Path, tmp_path: Path) -> None:
    # 32 rows over 5 ranks, in multiples of 8.
    found = shares(config_tree(trio, tmp_path, DISJOINT_5) | {"vocab_size": 32}, 5)
    assert [share.vocabulary_rows for share in found] == [range(8 * i, min(8 * i + 8, 32)) for i in range(5)]


@pytest.mark.parametrize(
    ("dtype", "distributed", "stage2"),
    [
        # Bytes per trained parameter: weight, float32 gradient, two float32 moments, and a float32 copy of 16 bits.
        ("fp32", False, 4 + 4 + 8),
        ("bf16", False, 2 + 4 + 8 + 4),
        ("fp32", True, 4 + 4 + 8 / 2),  # moments (and copy) sharded over two replicas
        ("bf16", True, 2 + 4 + 12 / 2),
    ],
)
def test_bytes_of_a_parameter_in_both_stages(
    trio: Path, tmp_path: Path, dtype: str, distributed: bool, stage2: float
) -> None:
    tree = config_tree(trio, tmp_path, {"kind": "colocated", "dp": 2}) | {"dtype": dtype}
    tree["parallel"] = {"distributed_optimizer": distributed}
    tree["gate"] = {"hidden_size": 8}
    (share,) = shares(tree, 2)  # the second replica holds the same
    gate = 8 * (64 + 2)
    weight = {"fp32": 4, "bf16": 2}[dtype]
    kinds = ("weights", "gradients", "optimizer")
    assert {number: sum(held[kind] for kind in kinds) for number, held in share.kinds.items()} == {
        1: share.parameters * weight + gate * (stage2_plain(dtype) - weight),
        2: share.parameters * stage2,
    }


def stage2_plain(dtype: str) -> int:
    return {"fp32": 16, "bf16": 18}[dtype]


@pytest.mark.parametrize(("left_out", "kept"), [(["stage1"], [2]), (["stage2"], [1]), (["stage1", "stage2"], [])])
def test_a_stage_without_steps_takes_no_memory_and_asks_for_no_schedule(
    trio: Path, tmp_path: Path, left_out: list[str], kept: list[int]
) -> None:
    tree = config_tree(trio, tmp_path, ONE)
    for name in left_out:
        tree[name] |= {"steps": 0, "min_lr": 1.0}  # no rate falls to 1.0
    (share,) = shares(tree, 1)
    assert list(share.kinds) == list(share.peaks) == kept
