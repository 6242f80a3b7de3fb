"""Every rank writes its own part, in the background; any layout and optimizer reads what any other has written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from support.trio import COLOCATED_TP2, CPU, DISJOINT_8, DISJOINT_UNEVEN, ONE, config_tree, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultrafuser_mega.checkpoint import saver
from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint, write_checkpoint
from ultrafuser_mega.checkpoint.chunks import chunks_to_write, described
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.models.fused import load_hf_weights
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model, run_sources
from ultrafuser_mega.training.optimizer import make_trainable

SHARDED = {"parallel": {"distributed_optimizer": True}}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp 2": (2, COLOCATED_TP2, {}),
    "dp 3, sharded optimizer": (3, ONE | {"dp": 3}, SHARDED),
    "uneven pp": (5, DISJOINT_UNEVEN, {}),
    "disjoint, unequal": (8, DISJOINT_8, {}),
    "tp 2, dp 2, sharded optimizer": (4, COLOCATED_TP2 | {"dp": 2}, SHARDED),
}


@pytest.fixture(scope="module")
def trained(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run's last checkpoint: bf16 weights, their float32 masters, both moments; only read."""
    tree = _tree(trio, tmp_path_factory.mktemp("trained"), "tp 2, dp 2, sharded optimizer")
    return list_checkpoints(train(tree, 4) / "checkpoints")[-1][1]


def _tree(trio: Path, runs: Path, layout: str) -> dict[str, Any]:
    tree = config_tree(trio, runs, LAYOUTS[layout][1]) | LAYOUTS[layout][2] | {"dtype": "bf16"}
    tree["stage1"] |= {"steps": 1}
    tree["stage2"] |= {"steps": 2}
    return tree


def test_layouts_hand_a_checkpoint_round_unchanged(trio: Path, tmp_path: Path, trained: Path) -> None:
    """The slow load matrix has every pair of these layouts and more."""
    before = trained
    for number, (name, (ranks, _, _)) in enumerate(LAYOUTS.items()):
        after = tmp_path / str(number)
        sent = run_ranks(_write_again, ranks, _tree(trio, tmp_path, name), before, after)
        # Descriptions of tensors, and not their numbers.
        assert all(kinds <= {torch.uint8, torch.int64} for kinds in sent)
        _assert_same_tensors(after, trained, name)
        before = after
    # Once more in the same layout: not a byte is another.
    run_ranks(_write_again, ranks, _tree(trio, tmp_path, name), before, tmp_path / "same")
    files = [".metadata", *(f"__{rank}_0.distcp" for rank in range(ranks))]
    assert [file for file in files if (before / file).read_bytes() != (tmp_path / "same" / file).read_bytes()] == []


def test_ranks_write_about_equal_bytes(trained: Path) -> None:
    written = [(trained / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert max(written) < 1.1 * sum(written) / len(written)


def test_what_is_saved_is_what_was_there_although_training_went_on(trio: Path, tmp_path: Path) -> None:
    tree = _tree(trio, tmp_path, "tp 2")
    assert run_ranks(_change_while_saving, 2, tree) == [[], []]
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    # keep: 1 and every fourth step; what an interrupted save had left is gone.
    assert names == ["stage2-step0000004", "stage2-step0000005", "stage2-step0000009"]


def _change_while_saving(rank: int, tree: dict[str, Any]) -> list[str]:
    """Save three times; of the last, names of weights that were not saved as they were when it was asked for."""
    plan = preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    model = build_model(plan, groups, CPU)
    load_hf_weights(model, plan.config.folders, groups)
    folder = plan.config.run_dir.parent / "saved"
    (folder / ".stage1-step0000001.partial").mkdir(parents=True, exist_ok=True)
    newer = folder / Progress(2, 9).folder  # from before which the run went on: no kept one
    newer.mkdir(exist_ok=True)
    (newer / "progress.json").touch()
    dist.barrier()
    may_write, write = threading.Event(), saver.write_checkpoint

    def late(*arguments: Any) -> None:
        assert may_write.wait(60)
        write(*arguments)

    saver.write_checkpoint = late  # type: ignore[assignment]
    writing = saver.Saver(folder, 1, 4, plan.identity, run_sources(plan) if rank == 0 else None)
    for step in (3, 4, 5):
        wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        may_write.clear()
        writing.save(Progress(2, step), chunks_to_write(model, None, groups))
        assert list(writing.news()) == []
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        may_write.set()
        assert writing.wait() is None
        assert list(writing.news()) == [f"checkpoint {folder / Progress(2, step).folder}"]
    load_checkpoint(folder / Progress(2, 5).folder, model, groups, None, 0)
    return [name for name, parameter in model.named_parameters() if not torch.equal(parameter, wanted[name])]


def test_what_megatron_wrote_for_the_first_versions_is_read(trio: Path, tmp_path: Path) -> None:
    assert run_ranks(_read_the_first_form, 2, _tree(trio, tmp_path, "tp 2"), tmp_path / "first") == [[], []]


def _read_the_first_form(rank: int, tree: dict[str, Any], folder: Path) -> list[str]:
    """Names of weights that are not read as they were written."""
    plan = preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    written, read = build_model(plan, groups, CPU), build_model(plan, groups, CPU)
    load_hf_weights(written, plan.config.folders, groups)
    folder.mkdir(exist_ok=True)
    dist.barrier()
    with megatron_scope(CPU):
        dist_checkpointing.save(dict(described(written, groups)), str(folder))
    load_checkpoint(folder, read, groups, None, 0)
    wanted = dict(written.named_parameters())
    return [name for name, parameter in read.named_parameters() if not torch.equal(parameter, wanted[name])]


def _assert_same_tensors(folder: Path, other: Path, where: str) -> None:
    mine, theirs = CheckpointTensors(folder), CheckpointTensors(other)
    assert mine.names() == theirs.names(), where
    for key in mine.names():
        rows = min(mine.shape(key)[0], theirs.shape(key)[0])  # padding of the vocabulary depends on the layout
        assert mine.dtype(key) == theirs.dtype(key)
        assert torch.equal(mine.read(key, slice(rows)), theirs.read(key, slice(rows))), (where, key)


def _write_again(rank: int, tree: dict[str, Any], written: Path, folder: Path) -> set[torch.dtype]:
    """Returns the element types of what ranks sent each other to save."""
    plan = preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False)
    groups, config = make_groups(plan.layout), plan.config
    model = build_model(plan, groups, CPU)
    trainable = make_trainable(
        model,
        model.config,
        groups.megatron,
        config.stage2,
        config.optimizer,
        distributed_optimizer=config.parallel.distributed_optimizer,
        overlap=True,
        device=CPU,
    )
    progress = Progress(2, config.stage2.steps)
    load_checkpoint(written, model, groups, trainable, progress.step, verified=True)
    if rank == 0:
        folder.mkdir()
    dist.barrier()
    sources = run_sources(plan) if rank == 0 else None
    with _Sent() as sent:
        chunks = chunks_to_write(model, trainable, groups)
        write_checkpoint(folder, folder, progress, chunks, groups.world, plan.identity, sources)
    return sent.kinds


class _Sent(TorchDispatchMode):
    """Notes the element types of what collectives carry; objects travel as bytes, their sizes as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.kinds |= {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        return func(*args, **(kwargs or {}))
