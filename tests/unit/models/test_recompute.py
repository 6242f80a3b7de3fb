"""Layers that the backward computes anew keep their input and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from support.trio import CPU, ONE, config_tree

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.packing import PackedTokens, positions_of, starts_of
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model

TOKENS = 96


def kept_bytes(rank: int, tree: dict[str, Any], layers: int | Literal["all"]) -> int:
    """What the forward of the math specialist, 4 layers of 64, keeps for its backward besides parameters."""
    tree["parallel"] = {"recompute_layers": layers}
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    model = build_model(plan, make_groups(plan.layout), CPU)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = PackedTokens(
        torch.zeros(1, TOKENS, dtype=torch.int64),
        torch.from_numpy(positions_of((TOKENS,))),
        torch.from_numpy(starts_of((TOKENS,))),
        (TOKENS,),
    )
    with megatron_scope(CPU), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.stages["math"](packed)
    return sum(storages.values())


def test_every_layer_that_is_recomputed_gives_back_what_it_kept(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path, ONE)
    kept = {layers: run_ranks(kept_bytes, 1, tree, layers)[0] for layers in (0, 1, 2, 4, "all", 99)}
    layer = kept[1] - kept[2]
    assert layer > 5 * TOKENS * 64 * 4, "a layer keeps several times its input"
    assert kept[0] - kept[1] >= layer and kept[2] - kept[4] >= layer
    assert kept["all"] == kept[99] == kept[4] < kept[0] / 3
