"""The dry run against the run: one rank on fake tensors must see what the same rank does and holds in a real job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.trio import COLOCATED_TP2, COLOCATED_TP2_PP2, CPU, DISJOINT_3, DISJOINT_8, ONE, config_tree
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.dry_run.fake_job import objects_are_alike
from ultrafuser_mega.dry_run.meter import Meter
from ultrafuser_mega.dry_run.rehearse import group_names, rank_classes, rehearse, run_parts
from ultrafuser_mega.planning.preflight import plan_layouts, preflight
from ultrafuser_mega.reporting.rehearsal import Rehearsal
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.prepare import open_store
from ultrafuser_mega.training.trainer import Trainer

ADAPTERS = {
    "stage2": {
        "steps": 3,
        "samples_per_class": 2,
        "lr": 5e-4,
        "train": {"heads": "frozen", "specialists": "lora", "math": "frozen"},
    }
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": (ONE, {}),
    "tp 2, sequence parallel": (COLOCATED_TP2, {"parallel": {"sequence_parallel": True}}),
    "tp 2, pp 2": (COLOCATED_TP2_PP2, {"parallel": {"recompute_layers": 1}}),
    "disjoint": (DISJOINT_3, {}),
    "disjoint, unequal": (DISJOINT_8, {"dtype": "bf16"}),
    "adapters, one specialist frozen": (DISJOINT_8, {"lora": {"rank": 4}, **ADAPTERS}),
    "dp 2, sharded optimizer": (ONE | {"dp": 2}, {"parallel": {"distributed_optimizer": True}, "dtype": "bf16"}),
}

SLOW = ("one rank", "disjoint")  # others have what is in them


@pytest.mark.parametrize(
    ("layout", "more"),
    [pytest.param(*LAYOUTS[name], id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS],
)
def test_fake_rank_holds_and_does_what_the_real_one_does(
    trio: Path, tmp_path: Path, layout: dict[str, Any], more: dict[str, Any]
) -> None:
    tree = config_tree(trio, tmp_path, layout) | more
    config = FuserConfig.model_validate(tree)
    plan = plan_layouts(config)[0]
    real = run_ranks(_rehearse_for_real, plan.world_size, tree)  # also prepares the data, which the dry run reads
    resolved = preflight(config, plan.world_size, resume=False)
    for rank in rank_classes(resolved):
        fake = rehearse(resolved, rank, CPU, TokenStore.open(config.store_dir))
        seen = Rehearsal.from_json(real[rank])
        assert [part.name for part in fake.parts] == ["evaluation", "stage 1", "stage 2", "checkpoint"]
        for ours, theirs in zip(fake.parts, seen.parts, strict=True):
            where = f"rank {rank}, {ours.name}"
            assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.02), where
            assert ours.flops == theirs.flops, where
            assert ours.collectives == theirs.collectives, where
            assert ours.microbatches == theirs.microbatches, where
            for kind in ("weights", "gradients", "optimizer"):
                assert ours.peak.get(kind, 0) == pytest.approx(theirs.peak.get(kind, 0), rel=0.02, abs=4096), where


class _Copies(TorchDispatchMode):
    """Gives the collectives copies, and ends each before the program goes on.

    A thread of gloo lets go of the tensors of a collective a moment after its wait() has returned, so that now and then
    they would still be alive where the program holds most.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "c10d" or func._overloadpacket.__name__ in ("send", "recv_"):  # these it does not hold
            return func(*args, **(kwargs or {}))
        leaves, tree = tree_flatten(args)
        copies = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        out = func(*tree_unflatten(copies, tree), **(kwargs or {}))
        *_, work = tree_leaves(out)
        dist.Work.unbox(work).wait()
        done: dict[int, Any] = {id(work): FakeWork().boxed()}  # gloo's may write once more where it is waited for again
        for leaf, copy in zip(leaves, copies, strict=True):
            if isinstance(leaf, torch.Tensor):
                done[id(copy)] = leaf.copy_(copy)
        return tree_map(lambda leaf: done.get(id(leaf)), out)


def _rehearse_for_real(rank: int, tree: dict[str, Any]) -> dict[str, Any]:
    plan = preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    store = open_store(plan, groups)
    meter = Meter("cpu", group_names(groups))
    with meter:
        trainer = Trainer(plan, groups, store, CPU, make_shard(plan, groups))
    trainer.load()
    with _Copies(), meter, objects_are_alike():  # their messages are no tensors of the program
        return Rehearsal(rank, list(run_parts(trainer, meter))).as_json()
