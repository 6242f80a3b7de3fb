"""The plan's bytes of activations are those that autograd keeps in a real forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import write_family
from support.trio import COLOCATED_TP2, COLOCATED_TP2_PP2, CPU, ONE, config_tree
from torch import Tensor

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.packing import PackedTokens, positions_of, starts_of
from ultrafuser_mega.planning.memory import kept_activations
from ultrafuser_mega.planning.microbatch import Microbatch
from ultrafuser_mega.planning.preflight import RunPlan, preflight
from ultrafuser_mega.planning.roles import role_of
from ultrafuser_mega.planning.trained import Trains
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model

LENGTHS, ROWS = (64, 32, 96), 100
TOKENS = sum(LENGTHS)


def planned(tree: dict[str, Any], ranks: int) -> RunPlan:
    return preflight(FuserConfig.model_validate(tree), ranks, resume=False)


def kept_bytes(rank: int, tree: dict[str, Any]) -> int:
    """Bytes of all storages that a forward leaves for its backward, the parameters' aside."""
    plan = planned(tree, torch.distributed.get_world_size())
    model = build_model(plan, make_groups(plan.layout), CPU).requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    packed = PackedTokens(
        torch.ones(1, TOKENS, dtype=torch.int64),
        torch.from_numpy(positions_of(LENGTHS)),
        torch.from_numpy(starts_of(LENGTHS)),
        LENGTHS,
    )
    tokens, rows = dict.fromkeys(model.stages, packed), dict.fromkeys(model.stages, torch.arange(ROWS))
    if role_of(plan, rank).stage:
        model.set_input_tensor([torch.zeros(model.handed_over(tokens), 1, 1, requires_grad=True)])
    with megatron_scope(CPU), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = model(tokens, rows)
    if isinstance(out, Tensor):  # what the next stage is sent
        keep(out)
    return sum(saved.untyped_storage().nbytes() for at, saved in kept.items() if at not in weights)


SP = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("layout", "ranks", "parallel"),
    [
        pytest.param(ONE, 1, {}, id="one_rank"),
        pytest.param(ONE, 1, {"recompute_layers": "all"}, id="one_rank_all_recomputed"),
        pytest.param(COLOCATED_TP2, 2, {}, id="tp2"),
        pytest.param(COLOCATED_TP2, 2, SP, id="tp2_sequence_parallel"),
        pytest.param(COLOCATED_TP2, 2, SP | {"recompute_layers": 1}, id="tp2_sequence_parallel_one_recomputed"),
        pytest.param(COLOCATED_TP2, 2, SP | {"recompute_layers": "all"}, id="tp2_sequence_parallel_all_recomputed"),
        pytest.param(COLOCATED_TP2_PP2, 4, SP, id="tp2_pp2_sequence_parallel"),
    ],
)
def test_autograd_keeps_what_the_plan_says(
    trio: Path, tmp_path: Path, layout: dict[str, Any], ranks: int, parallel: dict[str, Any]
) -> None:
    tree = config_tree(trio, tmp_path, layout) | {"parallel": parallel}
    compare(tree, ranks)


@pytest.mark.parametrize("tp", [1, 2])
def test_norms_of_queries_and_keys_keep_theirs(tmp_path: Path, trio: Path, tp: int) -> None:
    write_family(tmp_path / "models" / "qwen", "qwen3")
    tree = config_tree(trio, tmp_path, {"kind": "colocated", "tp": tp})
    tree |= {"models": str(tmp_path / "models"), "specialists": {"text": {"path": "qwen"}}}
    compare(tree, tp)


def compare(tree: dict[str, Any], ranks: int) -> None:
    plan = planned(tree, ranks)
    found = run_ranks(kept_bytes, ranks, tree)
    microbatch = Microbatch.alike(list(plan.architectures), TOKENS, ROWS)
    expected = [
        kept_activations(plan, role_of(plan, rank), microbatch, "cpu", Trains.of(plan.config, 2))
        for rank in range(ranks)
    ]
    if plan.config.parallel.recompute_layers != "all":  # cosines and sines, which count with the batch
        turned = TOKENS * 4 * sum(arch.head_dim for arch in plan.architectures.values())
        expected = [count + turned for count in expected]
    assert found == pytest.approx(expected, rel=0.01)
