"""What each of the two stages trains, and how their loss is normalised (paper, algorithm 1 and equation 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trio import CPU, DISJOINT_8, ONE, config_tree, read_steps, train
from torch.distributed.checkpoint import FileSystemReader

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.prepare import open_store
from ultrafuser_mega.training.run import run_facts
from ultrafuser_mega.training.stage import train_stage
from ultrafuser_mega.training.trainer import Trainer


def test_stage_one_trains_the_gate_and_nothing_else(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path, DISJOINT_8)
    tree["stage1"] |= {"steps": 2}
    for changed, with_gradients, optimized, gate_numel in run_ranks(_train_stage_one, 8, tree):
        assert changed <= {"fusion.gate.w1.shared", "fusion.gate.b1", "fusion.gate.w2"}
        assert with_gradients == changed
        assert optimized == gate_numel  # zero on the two ranks of the first stage of math
        assert bool(changed) == bool(gate_numel)
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1][1]
    optimizer = [
        key for key in FileSystemReader(path).read_metadata().state_dict_metadata if key.startswith("optimizer.")
    ]
    assert optimizer
    assert all(".gate." in key for key in optimizer)


def _train_stage_one(rank: int, tree: dict[str, Any]) -> tuple[set[str], set[str], int, int]:
    plan = preflight(FuserConfig.model_validate(tree), 8, resume=False)
    groups = make_groups(plan.layout)
    trainer = Trainer(plan, groups, open_store(plan, groups), CPU, make_shard(plan, groups))
    trainer.load()
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainables = []
    make = trainer.make_trainable

    def remembered(number: int) -> Any:
        trainables.append(make(number))
        return trainables[-1]

    trainer.make_trainable = remembered  # type: ignore[method-assign]
    with RunReport(run_facts(plan, CPU), enabled=rank == 0, done_steps=0) as report:
        train_stage(trainer, Progress(1, 0), report)
    after = dict(trainer.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    with_gradients = {name for name, p in after.items() if p.grad is not None or hasattr(p, "main_grad")}
    optimized = sum(p.numel() for group in trainables[0].optimizer.param_groups for p in group["params"])
    fusion = trainer.model.fusion
    return changed, with_gradients, optimized, sum(p.numel() for p in fusion.gate.parameters()) if fusion else 0


def test_loss_per_sample_is_the_sum_over_its_tokens(trio: Path, tmp_path: Path) -> None:
    """Same first step either way: only the divisor differs, tokens of the global batch against its samples."""
    first = {}
    for normalize in ("token", "sample"):
        tree = config_tree(trio, tmp_path / normalize, {**ONE, "dp": 2}) | {
            "loss": {"normalize": normalize},
            "microbatch_tokens": 320,
            "evaluation": {"samples_per_class": 1, "token_views": 0},
        }
        tree["stage1"] |= {"steps": 1}
        tree["stage2"] |= {"steps": 1}
        tree["optimizer"] = {"clip_grad": 0.0}
        tree["data"]["sampling"] = {"text": 2, "code": 1, "math": 0}
        first[normalize] = read_steps(train(tree, 2))
    for token, sample in zip(first["token"], first["sample"], strict=True):
        assert token["class_loss"].keys() == token["gate"].keys() == {"text", "code"}  # what no batch holds has no loss
        ratio = token["tokens"] / 6  # 2 samples for each of 3 classes
        assert sample["loss"] == pytest.approx(token["loss"] * ratio, rel=1e-6)
        assert sample["grad_norm"] == pytest.approx(token["grad_norm"] * ratio, rel=1e-4)


def test_smoothing_and_z_loss_reach_the_training_loss(trio: Path, tmp_path: Path) -> None:
    losses = {}
    for name, options in {"plain": {}, "smooth": {"label_smoothing": 0.9}, "z": {"z_loss": 0.01}}.items():
        tree = config_tree(trio, tmp_path / name, ONE) | {"loss": options}
        tree["evaluation"] = {"samples_per_class": 1, "token_views": 0}
        tree["stage1"] |= {"steps": 1, "samples_per_class": 4}
        tree["stage2"] |= {"steps": 0}
        losses[name] = read_steps(train(tree, 1))[0]["loss"]
    assert losses["z"] > losses["plain"] + 0.1
    assert abs(losses["smooth"] - losses["plain"]) > 1e-3
