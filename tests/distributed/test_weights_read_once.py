"""One replica reads the specialists' folders; the others receive what it has read, and end with it if it cannot."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.launched import launch
from support.trio import COLOCATED_TP2, CPU, DISJOINT_3, ONE, config_tree
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import load_checkpoint, write_checkpoint
from ultrafuser_mega.checkpoint.chunks import chunks_to_write
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.models.fused import FusedStage, load_hf_weights, load_weights
from ultrafuser_mega.models.hf_folder import HFWeights
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.device import joined_job, launched_ranks, launcher_store
from ultrafuser_mega.runtime.failure import first_failure_ends_job
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model, run_sources


@pytest.mark.parametrize(
    ("layout", "ranks", "dtype"),
    [
        pytest.param({**COLOCATED_TP2, "dp": 2}, 4, "bf16", id="colocated_bf16"),
        pytest.param({**DISJOINT_3, "dp": 2}, 6, "fp32", id="disjoint_fp32"),
    ],
)
def test_the_second_replica_opens_no_file_of_weights_and_holds_the_same(
    trio: Path, tmp_path: Path, layout: dict[str, Any], ranks: int, dtype: str
) -> None:
    """From folders and from a checkpoint."""
    tree = config_tree(trio, tmp_path, layout) | {"dtype": dtype}
    (tmp_path / "checkpoint").mkdir()
    found = run_ranks(_load, ranks, tree, tmp_path / "checkpoint")
    assert [different for _, different in found] == [set()] * ranks
    assert [opened for opened, _ in found] == [{".safetensors", ".distcp"}] * (ranks // 2) + [set()] * (ranks // 2)


def _load(rank: int, tree: dict[str, Any], checkpoint: Path) -> tuple[set[str], set[str]]:
    """(kinds of files of weights that loading opens, tensors that are not as read by this rank from the folders)."""
    plan = preflight(FuserConfig.model_validate(tree), torch.distributed.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    from_folders, from_checkpoint, expected = (build_model(plan, groups, CPU) for _ in range(3))
    dtype, sources = expected.config.params_dtype, run_sources(plan)
    load_weights(expected, {n: HFWeights(plan.config.folders[n], a, dtype) for n, a in plan.architectures.items()})
    chunks = chunks_to_write(expected, None, groups)
    write_checkpoint(checkpoint, checkpoint, Progress(1, 0), chunks, groups.world, plan.identity, sources)
    opened: set[str] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            opened.add(Path(str(arguments[0])).suffix)

    sys.addaudithook(note)  # for good, but this process ends with the test
    load_hf_weights(from_folders, plan.config.folders, groups)
    load_checkpoint(checkpoint, from_checkpoint, groups, None, 0)
    kinds = opened & {".safetensors", ".distcp"}
    wanted = _held(expected)
    different = {
        name
        for model in (from_folders, from_checkpoint)
        for name, tensor in _held(model).items()
        if not torch.equal(tensor, wanted[name])
    }
    return kinds, different


def _held(model: FusedStage) -> dict[str, Tensor]:
    assert model.fusion is not None and set(model.fusion.tails) == {"code", "math"}
    return {**dict(model.named_parameters()), **model.fusion.tails}


def test_what_the_reading_rank_cannot_read_ends_all_ranks_with_its_one_line(trio: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(trio, models)
    weights = load_file(models / "math" / "model.safetensors")
    weights["model.norm.weight"][0] = 3.4e38  # a float32 that no bfloat16 is near
    save_file(weights, models / "math" / "model.safetensors", {"format": "pt"})
    tree = config_tree(models, tmp_path / "runs", {**ONE, "dp": 3}) | {"dtype": "bf16"}

    codes, errors = launch(_load_in_a_job, tmp_path, json.dumps(tree))

    assert codes == [2, 1, 1]
    line = f"error: {models / 'math'}: tensor model.norm.weight: its largest value, 3.4e+38, is beyond bfloat16, "
    assert errors.count("error: ") == errors.count(line) == 1
    assert "Traceback" not in errors


def _load_in_a_job(tree: str) -> int:
    store = launcher_store()
    with first_failure_ends_job(store), joined_job(CPU, store):
        plan = preflight(FuserConfig.model_validate(json.loads(tree)), launched_ranks(), resume=False)
        groups = make_groups(plan.layout)
        load_hf_weights(build_model(plan, groups, CPU), plan.config.folders, groups)
    return 0
