"""An optimizer whose state lies in host memory trains as one that keeps it on the device, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trio import COLOCATED_TP2_PP2, DISJOINT_3, ONE, config_tree, read_steps, train

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors

PARTS: dict[str, Any] = {"heads": "frozen", "specialists": "lora", "math": "frozen", "gate": {"lr": 1e-2}}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, ONE, {}),
    "dp 2": (2, ONE | {"dp": 2}, {"dtype": "bf16"}),
    "dp 2, sharded optimizer": (2, ONE | {"dp": 2}, {"parallel": {"distributed_optimizer": True}}),
    "dp 2, sharded optimizer, bf16": (
        2,
        ONE | {"dp": 2},
        {"dtype": "bf16", "parallel": {"distributed_optimizer": True}},
    ),
    "tp 2, pp 2": (4, COLOCATED_TP2_PP2, {"dtype": "bf16", "parallel": {"sequence_parallel": True}}),
    "disjoint, adapters and frozen parts": (3, DISJOINT_3, {"dtype": "bf16", "lora": {"rank": 4}}),
}


QUICK = ("dp 2, sharded optimizer, bf16", "disjoint, adapters and frozen parts")  # what is in the others is in them


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in LAYOUTS])
def test_runs_and_resumed_runs_are_the_same_wherever_the_state_is(trio: Path, tmp_path: Path, name: str) -> None:
    ranks, layout, more = LAYOUTS[name]
    tree = config_tree(trio, tmp_path, layout) | more | {"checkpoint": {"every": 1, "keep": 9}}
    tree["optimizer"] = {"weight_decay": 0.1, "clip_grad": 0.05}
    if "lora" in more:
        tree["stage2"] |= {"train": PARTS, "lr": 5e-3}
    runs = {state: train(_with(tree, state, state), ranks) for state in ("device", "host")}
    assert any(step["grad_norm"] > 0.05 for step in read_steps(runs["host"]))  # something was clipped
    _assert_same(runs["device"], runs["host"])
    for began, ends in (("device", "host"), ("host", "device")):
        again = tmp_path / f"{began}-{ends}"
        shutil.copytree(runs[began], again)
        for progress, path in list_checkpoints(again / "checkpoints"):
            if (progress.stage, progress.step) > (2, 1):
                shutil.rmtree(path)
        train(_with(tree, ends, again.name), ranks, resume=True)
        _assert_same(runs["device"], again)


def _with(tree: dict[str, Any], state: str, name: str) -> dict[str, Any]:
    return tree | {"name": name, "optimizer": tree["optimizer"] | {"state": state}}


def _assert_same(one: Path, other: Path) -> None:
    steps = [[(step["loss"], step["grad_norm"], step["lr"]) for step in read_steps(run)] for run in (one, other)]
    assert steps[0] == steps[1] and len(steps[0]) == 5
    ends = [CheckpointTensors(list_checkpoints(run / "checkpoints")[-1][1]) for run in (one, other)]
    assert ends[0].names() == ends[1].names()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in ends[0].names())
    for key in ends[0].names():
        assert torch.equal(ends[0].read(key), ends[1].read(key)), key
