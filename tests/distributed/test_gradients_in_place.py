"""A run whose heads and embeddings add their gradients themselves is the run whose hooks add them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.trio import COLOCATED_TP2_PP2, CPU, ONE, config_tree, draw_nothing, gradients_in_many_buckets, read_steps
from torch.nn import functional

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.models import fusion_head, weight_gradients
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.run import run

ADAPTERS = {"gate": "frozen", "specialists": "lora", "math": "full"}
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "everything": (1, ONE, {}),
    "adapters beside heads, bf16": (1, ONE, {"dtype": "bf16", "lora": {"rank": 4}, "train": ADAPTERS}),
    "dp 2, sharded optimizer": (2, ONE | {"dp": 2}, {"parallel": {"distributed_optimizer": True}}),
    "tp 2, pp 2": (4, COLOCATED_TP2_PP2, {"parallel": {"sequence_parallel": True}}),
}
QUICK = ("everything", "dp 2, sharded optimizer")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in RUNS])
def test_microbatches_replicas_and_stages_add_up_as_with_hooks(trio: Path, tmp_path: Path, name: str) -> None:
    ranks, layout, more = RUNS[name]
    tree = config_tree(trio, tmp_path, layout) | {"microbatch_tokens": 240}
    tree["optimizer"] = {"eps": 1e-3, "clip_grad": 0.5}  # Adam's signs of gradients near 0 would be those of roundings
    tree["stage2"] |= {"lr": 5e-3, "train": more.get("train", {})}
    tree |= {key: value for key, value in more.items() if key != "train"}
    steps = []
    for way in ("in_place", "hooks"):
        added = run_ranks(_train, ranks, tree | {"name": way}, way == "hooks", timeout_s=240.0)
        if way == "hooks":
            assert not any(count for count, _ in added)
        else:  # in each of stage 2's three steps, of several microbatches
            assert all(count > 3 * weights > 0 for count, weights in added)
        steps.append(read_steps(tmp_path / way))
    assert len(steps[0]) == 5
    rel = 1e-2 if "bf16" in name else 1e-4  # of sums in another order, five updates long
    for one, other in zip(*steps, strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=rel)


def _train(rank: int, tree: dict[str, Any], hooks: bool) -> tuple[int, int]:
    """(gradients that were added in place, weights that they are of)."""
    draw_nothing()
    gradients_in_many_buckets()
    told = []
    added = weight_gradients._added

    def counted(weight: Any) -> Any:
        told.append(weight)
        return added(weight)

    weight_gradients._added = counted
    if hooks:
        fusion_head.adding_in_place = lambda weights: (list(weights), None)
        weight_gradients._embedding = lambda ids, table: functional.embedding(ids, table)
    run(preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False), CPU)
    return len(told), len({id(weight) for weight in told})
