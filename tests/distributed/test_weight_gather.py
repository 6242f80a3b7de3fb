"""The distributed optimizer's weights come under the forward, and nothing ever reads one that has not come yet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Bucket
from support.trio import CPU, ONE, config_tree, draw_nothing, gradients_in_many_buckets, read_steps

from ultrafuser_mega.baselines.distilled import distilled
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.importer import import_specialists, plan_config
from ultrafuser_mega.inference.answer_ids import answer_ids
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.prepare import prepare
from ultrafuser_mega.training.run import run

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp 2": (ONE | {"dp": 2}, {"dtype": "bf16"}),
    "pp 2, dp 2, recomputed": (ONE | {"pp": 2, "dp": 2}, {"parallel": {"recompute_layers": 1}}),
}


@pytest.mark.parametrize(("layout", "more"), LAYOUTS.values(), ids=LAYOUTS)
def test_late_weights_are_waited_for_in_training_evaluation_and_checkpoints(
    trio: Path, tmp_path: Path, layout: dict[str, Any], more: dict[str, Any]
) -> None:
    tree = config_tree(trio, tmp_path, layout) | more
    tree["parallel"] = tree.get("parallel", {}) | {"distributed_optimizer": True}
    tree["evaluation"] |= {"every": 2}
    tree["checkpoint"] = {"every": 1, "keep": 9}
    ranks = 2 * layout.get("pp", 1)
    for name in ("at-once", "late"):  # in a job ranks wait for rank 0's store once
        plan = preflight(FuserConfig.model_validate(tree | {"name": name}), ranks, resume=False)
        prepare(plan.config, plan.vocab_size)
    waited = run_ranks(_train_twice, ranks, tree)
    at_once, late = (tmp_path / name for name in ("at-once", "late"))
    results = [[(step["loss"], step["grad_norm"]) for step in read_steps(folder)] for folder in (at_once, late)]
    assert results[0] == results[1] and len(results[0]) == 5
    assert max(waited) > 3  # buckets; Megatron makes one where a stage is not the first
    written = sorted((late / "checkpoints").iterdir())
    assert len(written) == 5
    for folder in written:
        mine, theirs = CheckpointTensors(folder), CheckpointTensors(at_once / "checkpoints" / folder.name)
        assert mine.names() == theirs.names()
        for key in mine.names():
            rows = slice(mine.shape(key)[0])
            assert torch.equal(mine.read(key, rows), theirs.read(key, rows)), (folder.name, key)


def test_a_student_answers_with_weights_that_have_all_come(trio: Path, tmp_path: Path) -> None:
    import_specialists(plan_config(FuserConfig.model_validate(config_tree(trio, tmp_path, ONE)), None), tmp_path / "t")
    settings = ["data={own: 0, on_policy: 1}", "refresh=1", "max_new_tokens=4"]
    overrides = [f"runs={tmp_path}", "stage2.steps=3", *(f"distil.{setting}" for setting in settings)]
    tree = distilled(tmp_path / "t", "text", overrides=overrides).config.model_dump(mode="json")
    tree |= {"layouts": [ONE | {"dp": 2}], "parallel": {"distributed_optimizer": True}}
    for name in ("at-once", "late"):
        plan = preflight(FuserConfig.model_validate(tree | {"name": name}), 2, resume=False)
        prepare(plan.config, plan.vocab_size)
    assert max(run_ranks(_train_twice, 2, tree)) > 3
    at_once, late = (sorted((tmp_path / name / "answers").glob("*.jsonl")) for name in ("at-once", "late"))
    assert [path.read_text() for path in at_once] == [path.read_text() for path in late] and len(late) == 3


def _train_twice(rank: int, tree: dict[str, Any]) -> int:
    """Trains with weights that are gathered at once, and with such as come in the last moment; counts late buckets.

    Both with the same buckets: which part of a gradient a replica's norm is of depends on them, and so its last bits.
    """
    draw_nothing()
    gradients_in_many_buckets()
    gather = Bucket.start_param_sync
    Bucket.start_param_sync = _started(gather, late=None)
    _train(tree | {"name": "at-once"})
    buckets = set[int]()
    Bucket.start_param_sync = _started(gather, late=buckets)
    _train(tree | {"name": "late"})
    return len(buckets)


def _train(tree: dict[str, Any]) -> None:
    run(preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False), CPU, answering=answer_ids)


def _started(gather: Any, late: set[int] | None) -> Any:
    """A gather that is over when it has begun; or ``late``, which collects the buckets.

    A late one begins with NaN in all that replicas have to bring, and brings it when it is waited for.
    """

    class Handle:
        def __init__(self, bucket: Bucket) -> None:
            self.bucket = bucket

        def wait(self) -> None:
            self.bucket.param_gather_handle = None
            if late is not None:
                gather(self.bucket, force_sync=True)

    def start(bucket: Bucket, force_sync: bool = False) -> None:
        assert bucket.param_gather_handle is None and not force_sync
        if late is None:
            gather(bucket, force_sync=True)
        else:
            late.add(id(bucket))
            replicas = bucket.intra_distributed_optimizer_instance_size
            for part in bucket.buckets:
                for replica, shard in enumerate(part.param_data.chunk(replicas)):
                    if replica != bucket.intra_distributed_optimizer_instance_rank:
                        shard.fill_(math.nan)
        bucket.param_gather_handle, bucket.param_gather_dispatched = Handle(bucket), True

    return start
