"""`ultrafuser plan` promises what the ranks then hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table
from support.trio import COLOCATED_TP2_PP2, CPU, DISJOINT_8, ONE, config_tree, write_trio

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.planning.plan_table import plan_table
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.trainer import build_model

DISJOINT_5 = {"kind": "disjoint", "specialists": {"text": {"tp": 2}, "code": {}, "math": {"tp": 2}}}


@pytest.fixture(scope="module")
def widths_differ(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trio(tmp_path_factory.mktemp("trio"), (64, 48, 96))


def column(table: Table, header: str) -> list[str]:
    (found,) = (column for column in table.columns if column.header == header)
    return [str(cell) for cell in found.cells]


def table_of(tree: dict[str, Any], ranks: int) -> Table:
    return plan_table(preflight(FuserConfig.model_validate(tree), ranks, resume=False))


def held_parameters(rank: int, tree: dict[str, Any]) -> int:
    plan = preflight(FuserConfig.model_validate(tree), torch.distributed.get_world_size(), resume=False)
    return sum(parameter.numel() for parameter in build_model(plan, make_groups(plan.layout), CPU).parameters())


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param(ONE, 1, id="one_rank"),
        pytest.param(COLOCATED_TP2_PP2, 4, id="colocated_tp2_pp2"),
        pytest.param(DISJOINT_8, 8, id="disjoint_8_ranks"),
    ],
)
@pytest.mark.parametrize("folder", ["trio", "widths_differ"])
def test_parameters_in_the_table_are_those_of_the_built_model(
    request: pytest.FixtureRequest, tmp_path: Path, folder: str, layout: dict[str, Any], ranks: int
) -> None:
    tree = config_tree(request.getfixturevalue(folder), tmp_path, layout)
    held = run_ranks(held_parameters, ranks, tree)
    assert column(table_of(tree, ranks), "parameters") == [f"{count:,}" for count in held]


def test_places_and_vocabulary_rows_of_the_default_layout(trio: Path, tmp_path: Path) -> None:
    table = table_of(config_tree(trio, tmp_path, DISJOINT_8), 8)
    assert column(table, "rank") == [str(rank) for rank in range(8)]
    assert column(table, "specialist") == ["text"] * 2 + ["code"] * 2 + ["math"] * 4
    assert column(table, "tp") == ["1/2", "2/2"] * 4
    assert column(table, "stage") == ["1/1"] * 4 + ["1/2"] * 2 + ["2/2"] * 2
    # 400 shared rows over 6 ranks, in multiples of 8: 72 each, 40 on the last.
    rows = ["0-71", "72-143", "144-215", "216-287", "-", "-", "288-359", "360-399"]
    assert column(table, "vocabulary rows") == rows


def test_rank_whose_vocabulary_rows_are_all_padding_says_so(trio: Path, tmp_path: Path) -> None:
    # 32 rows over 5 ranks, in multiples of 8.
    table = table_of(config_tree(trio, tmp_path, DISJOINT_5) | {"vocab_size": 32}, 5)
    assert column(table, "vocabulary rows") == ["0-7", "8-15", "16-23", "24-31", "padding"]


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
    table = table_of(tree, 2)
    parameters = int(column(table, "parameters")[0].replace(",", ""))
    gate = 8 * (64 + 2)
    weight = {"fp32": 4, "bf16": 2}[dtype]
    stage1 = parameters * weight + gate * (stage2_plain(dtype) - weight)
    assert column(table, "stage 1") == [f"{stage1 / 2**20:.0f} MiB"]
    assert column(table, "stage 2") == [f"{parameters * stage2 / 2**20:.0f} MiB"]


def stage2_plain(dtype: str) -> int:
    return {"fp32": 16, "bf16": 18}[dtype]
