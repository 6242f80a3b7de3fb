"""Every layout, with either optimizer, goes on from what every layout has saved as the saving one does itself.

In float32, where losses can be compared between layouts. In bfloat16, whose checkpoints hold float32 weights as well, a
layout reads what the other optimizer has saved in every layout, and trains on from its own alone. Slow: the quick forms
are the round of layouts in test_saving.py and the resumed runs in test_checkpoints.py.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.trio import COLOCATED_TP2, COLOCATED_TP2_PP2, CPU, DISJOINT_8, DISJOINT_UNEVEN, ONE, config_tree

from ultrafuser_mega.checkpoint.checkpoint import load_checkpoint, write_checkpoint
from ultrafuser_mega.checkpoint.chunks import chunks_to_write
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.batches import TrainingBatches
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.assembly import make_shard, run_sources
from ultrafuser_mega.training.prepare import open_store
from ultrafuser_mega.training.trainer import Trainer

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, ONE),
    "tp 2": (2, COLOCATED_TP2),
    "tp 2, pp 2": (4, COLOCATED_TP2_PP2),
    "dp 2": (2, ONE | {"dp": 2}),
    "disjoint, unequal": (8, DISJOINT_8),
    "uneven pp": (5, DISJOINT_UNEVEN),
}
CASES = {
    f"{layout}, {kind} optimizer": (ranks, place, kind == "sharded")
    for layout, (ranks, place) in LAYOUTS.items()
    for kind in ("plain", "sharded")
}
STEPS, MORE = 2, 3  # trained before saving, and after
#: Sums in float32 are of another order in another layout: some 1e-7 of a loss, and no more after three small steps.
SAME_LOSS = 1e-6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Saved:
    """What a layout has trained and saved.

    losses: of the steps with which it went on.
    """

    folder: Path
    losses: list[float]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def saved(request: pytest.FixtureRequest, trio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Of every case; only read."""
    root = tmp_path_factory.mktemp(request.param)
    found = {}
    for number, case in enumerate(CASES):
        folder = root / f"{number:02d}"
        losses = run_ranks(_train_and_save, CASES[case][0], _tree(trio, root, case), folder)[0]
        found[case] = Saved(folder, losses, _tensors_of(folder))
    return found


@pytest.mark.parametrize("case", CASES)
def test_goes_on_from_every_case_as_that_itself(trio: Path, tmp_path: Path, case: str, saved: dict[str, Saved]) -> None:
    (ranks, _, sharded), own, again = CASES[case], saved[case], tmp_path / "again"
    is_fp32 = own.folder.parent.name.startswith("fp32")
    writers = {writer: saved[writer] for writer in CASES if is_fp32 or CASES[writer][2] != sharded or writer == case}
    folders = {of_one.folder: is_fp32 or of_one is own for of_one in writers.values()}
    again.mkdir()
    losses = run_ranks(_load, ranks, _tree(trio, own.folder.parent, case), folders, again, timeout_s=1200)[0]
    for writer, theirs in writers.items():
        _assert_same_tensors(again / theirs.folder.name, theirs.tensors, writer)
        if is_fp32:
            assert losses[theirs.folder.name] == pytest.approx(theirs.losses, rel=SAME_LOSS), writer
    # Loaded by a fresh process in the same layout: nothing is another.
    assert _bytes_of(again / own.folder.name) == _bytes_of(own.folder)
    assert losses[own.folder.name] == own.losses
    shutil.rmtree(again)


def _tree(trio: Path, root: Path, case: str) -> dict[str, Any]:
    _, layout, sharded = CASES[case]
    tree = config_tree(trio, root / "runs", layout)
    tree |= {"dtype": root.name[:4], "parallel": {"distributed_optimizer": sharded}}
    tree["stage1"] |= {"steps": 0}
    tree["stage2"] |= {"steps": STEPS + MORE}
    return tree


def _train_and_save(rank: int, tree: dict[str, Any], folder: Path) -> list[float]:
    trainer, batches = _trainer(tree)
    trainer.load()
    trainable = trainer.make_trainable(2)
    _losses(trainer, trainable, batches, range(STEPS))
    _save(trainer, trainable, folder)
    return _losses(trainer, trainable, batches, range(STEPS, STEPS + MORE))


def _load(rank: int, tree: dict[str, Any], folders: dict[Path, bool], again: Path) -> dict[str, list[float]]:
    """Load every folder, save what was loaded, go on from those marked: name -> losses of the steps."""
    trainer, batches = _trainer(tree)
    losses = {}
    for folder, goes_on in folders.items():
        trainable = trainer.make_trainable(2)
        load_checkpoint(folder, trainer.model, trainer.groups, trainable, STEPS)
        _save(trainer, trainable, again / folder.name)
        if goes_on:
            losses[folder.name] = _losses(trainer, trainable, batches, range(STEPS, STEPS + MORE))
    return losses


def _trainer(tree: dict[str, Any]) -> tuple[Trainer, TrainingBatches]:
    plan = preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    plan.config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(plan, groups, open_store(plan, groups), CPU, make_shard(plan, groups))
    stage = plan.config.stage2
    return trainer, TrainingBatches(trainer.store, stage.samples_per_class, plan.config.seed + 2, trainer.shard)


def _losses(trainer: Trainer, trainable: Trainable, batches: TrainingBatches, steps: range) -> list[float]:
    return [trainer.step(2, trainable, batches, step, 0.0)[0].loss for step in steps]


def _save(trainer: Trainer, trainable: Trainable, folder: Path) -> None:
    first, groups = trainer.groups.rank == 0, trainer.groups
    if first:
        folder.mkdir()
    dist.barrier()
    chunks = chunks_to_write(trainer.model, trainable, groups)
    sources = run_sources(trainer.plan) if first else None
    write_checkpoint(folder, folder, Progress(2, STEPS), chunks, groups.world, trainer.plan.identity, sources)


def _assert_same_tensors(folder: Path, wanted: dict[str, torch.Tensor], where: str) -> None:
    found = _tensors_of(folder)
    assert found.keys() == wanted.keys(), where
    for key, tensor in found.items():
        rows = min(len(tensor), len(wanted[key]))  # padding of the vocabulary depends on the layout
        assert tensor.dtype == wanted[key].dtype, (where, key)
        assert torch.equal(tensor[:rows], wanted[key][:rows]), (where, key)


def _tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = CheckpointTensors(folder, verified=True)
    return {key: tensors.read(key) for key in tensors.names()}


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
