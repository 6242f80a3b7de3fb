"""A rank's share of the model is built where it computes: nothing of it is made on the host and moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.trio import CPU, ONE, config_tree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model

GPU = torch.device("cuda", 0)


def built(rank: int, tree: dict[str, Any]) -> tuple[set[str], dict[str, Any], dict[str, Any]]:
    """(devices of a model that is built on a GPU, which fake tensors have without one; what it holds; the same here)"""
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    groups = make_groups(plan.layout)
    torch.cuda.current_device = lambda: GPU  # type: ignore[assignment,return-value]  # this process ends with the test
    with FakeTensorMode():
        there = held(build_model(plan, groups, GPU))
    here = held(build_model(plan, groups, CPU))
    return {str(tensor.device) for tensor in there.values()}, kinds(there), kinds(here)


def held(model: FusedStage) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def kinds(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}


def test_every_parameter_and_buffer_is_made_on_the_device(trio: Path, tmp_path: Path) -> None:
    devices, there, here = run_ranks(built, 1, config_tree(trio, tmp_path, ONE))[0]
    assert devices == {"cuda:0"}
    assert there == here and {"specialists.math.frequencies", "fusion.heads.math", "fusion.gate.w2"} <= there.keys()
