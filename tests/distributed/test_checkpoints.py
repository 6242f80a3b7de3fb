"""Checkpoints: resuming is exact, layouts may change, a cut-off write leaves nothing that looks whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.trio import (
    COLOCATED_TP2_PP2,
    COLOCATED_TP4,
    CPU,
    DISJOINT_3,
    DISJOINT_8,
    ONE,
    config_tree,
    read_steps,
    train,
)

from ultrafuser_mega.checkpoint import checkpoint
from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint, read_progress
from ultrafuser_mega.checkpoint.chunks import Chunk
from ultrafuser_mega.checkpoint.integrity import FileRecords
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.fused import load_hf_weights
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model
from ultrafuser_mega.training.run import run

TIMES = ("seconds", "tokens_per_s", "data_seconds", "memory_bytes", "peak_memory_bytes", "save_seconds", "phases")


def _tree(trio: Path, runs: Path, layout: dict[str, Any], parallel: dict[str, bool], dtype: str) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout) | {"parallel": parallel, "dtype": dtype}
    tree["stage1"] |= {"steps": 2, "warmup_steps": 2}  # a cut after its first step falls into the warm-up
    tree["stage2"] |= {"steps": 2, "warmup_steps": 1, "gate_lr": 5e-3}
    tree["checkpoint"] = {"every": 1, "keep": 20}
    return tree


@pytest.fixture(scope="module")
def whole_8(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on 8 ranks; only read and copied."""
    return train(_tree(trio, tmp_path_factory.mktemp("whole_8"), DISJOINT_8, {}, "fp32"), 8)


@pytest.fixture(scope="module")
def whole_1(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank that writes a checkpoint every step and keeps two; only read."""
    tree = _tree(trio, tmp_path_factory.mktemp("whole_1"), ONE, {}, "fp32")
    return train(tree | {"checkpoint": tree["checkpoint"] | {"keep": 2}}, 1)


@pytest.mark.parametrize(
    ("layout", "ranks", "parallel", "dtype", "cut"),
    [
        pytest.param(DISJOINT_8, 8, {}, "fp32", Progress(1, 2), id="disjoint_8_fp32"),
        pytest.param(COLOCATED_TP2_PP2, 4, {"sequence_parallel": True}, "bf16", Progress(1, 1), id="colocated_4_bf16"),
        pytest.param(
            *(COLOCATED_TP4, 4, {}, "bf16", Progress(2, 1)), id="shared_key_value_heads_bf16", marks=pytest.mark.slow
        ),
        pytest.param(
            {**DISJOINT_3, "dp": 2}, 6, {"distributed_optimizer": True}, "bf16", Progress(2, 1), id="dp2_distributed"
        ),
    ],
)
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    request: pytest.FixtureRequest,
    trio: Path,
    tmp_path: Path,
    layout: dict[str, Any],
    ranks: int,
    parallel: dict[str, bool],
    dtype: str,
    cut: Progress,
) -> None:
    tree = _tree(trio, tmp_path / "whole", layout, parallel, dtype)
    whole = request.getfixturevalue("whole_8") if ranks == 8 else train(tree, ranks)
    resumed_tree = tree | {"runs": str(tmp_path / "resumed"), "checkpoint": {"every": 0}}
    resumed = _cut_off(whole, resumed_tree, cut)
    train(resumed_tree, ranks, resume=True)
    again, before = ([_untimed(step) for step in read_steps(run)] for run in (resumed, whole))
    assert again == before
    assert _result(resumed) == _result(whole)


def _cut_off(whole: Path, tree: dict[str, Any], cut: Progress) -> Path:
    """Make the folder of ``tree``'s run a copy of the run ``whole``, cut off behind its checkpoint ``cut``."""
    copy = FuserConfig.model_validate(tree).run_dir
    shutil.copytree(whole, copy)
    there = list_checkpoints(copy / "checkpoints")
    assert cut in [progress for progress, _ in there]
    for progress, path in there:
        if progress > cut:
            shutil.rmtree(path)
    return copy


def test_another_layout_and_optimizer_go_on_from_a_checkpoint(trio: Path, tmp_path: Path, whole_8: Path) -> None:
    tree = _tree(trio, tmp_path / "other", {**DISJOINT_3, "dp": 2}, {"distributed_optimizer": True}, "fp32")
    other = _cut_off(whole_8, tree, Progress(2, 1))
    train(tree, 6, resume=True)
    for mine, theirs in zip(read_steps(other), read_steps(whole_8), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_rows_beyond_the_shared_vocabulary_survive_unchanged(trio: Path, whole_8: Path) -> None:
    (same,) = run_ranks(_tails_equal_their_source, 1, _tree(trio, whole_8.parent, DISJOINT_8, {}, "fp32"))
    assert same == {"code": True, "math": True}


def _tails_equal_their_source(rank: int, tree: dict[str, Any]) -> dict[str, bool]:
    plan = preflight(FuserConfig.model_validate({**tree, "layouts": [ONE]}), 1, resume=False)
    groups = make_groups(plan.layout)
    model, source = build_model(plan, groups, CPU), build_model(plan, groups, CPU)
    load_hf_weights(source, plan.config.folders, groups)
    load_checkpoint(list_checkpoints(plan.config.run_dir / "checkpoints")[-1][1], model, groups, None, 0)
    assert source.fusion is not None and model.fusion is not None
    return {name: torch.equal(tail, source.fusion.tails[name]) for name, tail in model.fusion.tails.items()}


def test_only_the_newest_checkpoints_are_kept(whole_1: Path) -> None:
    assert [progress for progress, _ in list_checkpoints(whole_1 / "checkpoints")] == [Progress(2, 1), Progress(2, 2)]
    assert [path.name for path in (whole_1 / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_checkpoint_of_another_model_is_refused_by_name(whole_1: Path) -> None:
    path = list_checkpoints(whole_1 / "checkpoints")[-1][1]
    identity = json.loads((path / "progress.json").read_text())["identity"]
    assert read_progress(path, identity) == Progress(2, 2)
    identity["specialists"]["math"]["layers"] = 8
    with pytest.raises(InputError, match=r"another model: specialists\.math\.layers is 4 there and 8 here"):
        read_progress(path, identity)


def test_writes_that_fail_midway_leave_no_checkpoint_and_the_last_one_ends_the_run(trio: Path, tmp_path: Path) -> None:
    tree = _tree(trio, tmp_path, ONE, {}, "fp32")
    refused = r"cannot be read or written \(disk full; .* GB are free there\)"
    with pytest.raises(InputError, match=rf"/stage2-step0000002: {refused}$"):
        run_ranks(_train_with_a_full_disk, 1, tree)
    told = (tmp_path / "told.txt").read_text()
    assert len(re.findall(rf"/stage[12]-step000000[12]: {refused}; training goes on", told)) == 3
    folder = FuserConfig.model_validate(tree).run_dir / "checkpoints"
    assert list(folder.iterdir()) == []


def _train_with_a_full_disk(rank: int, tree: dict[str, Any]) -> None:
    def half_a_save(folder: Path, chunks: Sequence[Chunk], group: dist.ProcessGroup) -> FileRecords:
        (folder / "__0_0.distcp").write_bytes(b"half")
        raise OSError("disk full")

    checkpoint.write_chunks = half_a_save
    note = RunReport.note

    def noted(report: RunReport, text: str) -> None:
        with (Path(tree["runs"]) / "told.txt").open("a") as file:
            file.write(text + "\n")
        note(report, text)

    setattr(RunReport, "note", noted)  # noqa: B010 (a type of its own)
    run(preflight(FuserConfig.model_validate(tree), 1, resume=False), CPU)


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def _result(run: Path) -> Any:
    summary = json.loads((run / "summary.json").read_text())
    return {key: summary[key] for key in ("eval", "gate_per_token", "steps")}
