"""More tensor-parallel ranks than key/value heads: a head's copies stay one weight, and nobody outside sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.families import write_family
from support.trio import COLOCATED_TP4, CPU, ONE, config_tree, read_steps, train, write_trio

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint, write_checkpoint
from ultrafuser_mega.checkpoint.chunks import Chunk, chunks_to_write
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import import_specialists, plan_folders
from ultrafuser_mega.convert.verify import verification_batches, verify_specialist
from ultrafuser_mega.models.families import FAMILIES
from ultrafuser_mega.models.families.rules import FusedQKV
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import plan_colocated
from ultrafuser_mega.runtime.shared_rows import shared_rows
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training import checkpoints
from ultrafuser_mega.training.assembly import build_model, run_sources
from ultrafuser_mega.training.optimizer import make_trainable
from ultrafuser_mega.training.run import run

# Eight query heads each: two or one to a rank of four or eight.
GROUPS = {"llama": 2, "qwen2": 2, "qwen3": 1}
CLIP = 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Without extras, with biases, with norms of queries and keys; read only."""
    root = tmp_path_factory.mktemp("families")
    return {case: write_family(root / case, case, num_key_value_heads=groups) for case, groups in GROUPS.items()}


@pytest.mark.parametrize(
    ("case", "tp", "pp", "sequence_parallel"),
    [("llama", 8, 1, True), ("qwen2", 4, 2, True), ("qwen3", 2, 1, False), ("qwen3", 4, 1, True)],
)
def test_specialist_equals_transformers(
    folders: dict[str, Path], case: str, tp: int, pp: int, sequence_parallel: bool
) -> None:
    batches = verification_batches(folders[case], "def add(a, b): return a + b", multiple=tp)
    comparison = verify_specialist(folders[case], tp, pp, batches, sequence_parallel=sequence_parallel)
    assert comparison.equal
    assert all(found.top1 == 1.0 for found in comparison.batches)


@pytest.mark.parametrize("tp", [4, 8])
def test_import_and_export_give_every_tensor_back(folders: dict[str, Path], tmp_path: Path, tp: int) -> None:
    import_specialists(plan_folders(folders, None), tmp_path / "checkpoint", plan_colocated(list(folders), tp, 1, dp=1))
    for case, source in folders.items():
        export(tmp_path / "checkpoint", tmp_path / case, f"specialist:{case}", verify=False)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / case, source))
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def tree_of(trio: Path, runs: Path, layout: dict[str, Any]) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout)
    tree["stage1"] |= {"steps": 1}
    tree["stage2"] |= {"steps": 3, "warmup_steps": 0}
    tree["evaluation"] = {"samples_per_class": 2, "token_views": 0}
    tree["optimizer"] = {"eps": 1e-6, "clip_grad": CLIP}  # eps: gradients that are rounding alone stay small steps
    return tree


@pytest.mark.parametrize(
    ("cases", "layout", "distributed"),
    [
        pytest.param(
            *(("qwen2", "qwen2_tied", "qwen2"), {**COLOCATED_TP4, "pp": 2}, False),
            id="biases_pp2",
            marks=pytest.mark.slow,
        ),
        pytest.param(("llama", "llama", "qwen3"), {**COLOCATED_TP4, "dp": 2}, True, id="norms_distributed_optimizer"),
    ],
)
def test_copies_are_one_weight_in_training_and_in_checkpoints(
    tmp_path: Path, cases: tuple[str, ...], layout: dict[str, Any], distributed: bool
) -> None:
    """Losses and norms of one rank; what is written is read by one rank and by four, and written again, bit for bit."""
    trio = write_trio(tmp_path)
    for name, case, groups in zip(("text", "code", "math"), cases, (8, 2, 1), strict=True):
        write_family(trio / name, case, vocab_rows=416, num_key_value_heads=groups)
    one = train(tree_of(trio, tmp_path / "one", ONE), 1)
    tree = tree_of(trio, tmp_path / "run", layout)
    tree["parallel"] = {"sequence_parallel": True, "distributed_optimizer": distributed}
    run = FuserConfig.model_validate(tree).run_dir

    compared = run_ranks(_train_comparing_copies, 8, tree)

    assert all(result["copies"] > 0 for result in compared)
    assert [result["different"] for result in compared] == [[]] * 8
    for mine, theirs in zip(read_steps(run), read_steps(one), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert theirs["grad_norm"] > CLIP or theirs["stage"] == 1  # a head counted twice would be clipped otherwise
    written = list_checkpoints(run / "checkpoints")[-1][1]
    by_one, by_four = tmp_path / "by_one", tmp_path / "by_four"
    run_ranks(_write_again, 1, tree_of(trio, tmp_path, ONE), written, by_one)
    run_ranks(_write_again, 4, tree_of(trio, tmp_path, COLOCATED_TP4), by_one, by_four)
    first, *again = (CheckpointTensors(folder) for folder in (written, by_one, by_four))
    keys = run_ranks(_stored_keys, 1, tree_of(trio, tmp_path, ONE))[0]
    assert all(key in first for key in keys)
    for key in keys:
        for other in again:
            assert other.shape(key) == first.shape(key)
            assert torch.equal(other.read(key), first.read(key)), key


def _train_comparing_copies(rank: int, tree: dict[str, Any]) -> dict[str, Any]:
    """A whole run; before each checkpoint copies of shared rows are compared with those of the first rank that has any.

    Returns:
        How many were compared, and the names of parameters where they differed.
    """
    found: dict[str, Any] = {"copies": 0, "different": []}
    save = checkpoints.chunks_to_write

    def compare_and_save(model: FusedStage, *rest: Any) -> list[Chunk]:
        for name, parameter in model.named_parameters():
            if (rows := shared_rows(parameter)) is None:
                continue
            group = model.stages[name.split(".")[1]].pg_collection.tp
            mine = parameter.detach()[rows.first :].contiguous()
            everyones = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(everyones, mine, group=group)
            found["copies"] += rows.copies > 1
            if not torch.equal(everyones[group.rank() // rows.copies * rows.copies], mine):
                found["different"].append(name)
        return save(model, *rest)

    checkpoints.chunks_to_write = compare_and_save  # type: ignore[assignment]
    run(preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False), CPU)
    return found


def _write_again(rank: int, tree: dict[str, Any], written: Path, folder: Path) -> None:
    plan = preflight(FuserConfig.model_validate(tree), dist.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    model, config = build_model(plan, groups, CPU), plan.config
    trainable = make_trainable(
        model,
        model.config,
        groups.megatron,
        config.stage2,
        config.optimizer,
        distributed_optimizer=False,
        overlap=True,
        device=CPU,
    )
    progress = Progress(2, config.stage2.steps)
    load_checkpoint(written, model, groups, trainable, progress.step)
    if rank == 0:
        folder.mkdir()
    dist.barrier()
    sources = run_sources(plan) if rank == 0 else None
    chunks = chunks_to_write(model, trainable, groups)
    write_checkpoint(folder, folder, progress, chunks, groups.world, plan.identity, sources)


def _stored_keys(rank: int, tree: dict[str, Any]) -> list[str]:
    """Names of what a checkpoint holds of the projections of queries, keys and values."""
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    model = build_model(plan, make_groups(plan.layout), CPU)
    fused = {
        f"specialists.{name}.decoder.layers.{rule.stored}"
        for name, stage in model.stages.items()
        for rule in FAMILIES[stage.arch.family].rules
        if isinstance(rule, FusedQKV)
    }
    return sorted(fused | {f"optimizer.{kind}.{key}" for kind in ("exp_avg", "exp_avg_sq") for key in fused})
