"""When a stage ends, what it draws from, and which of its checkpoints stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.trio import ONE, config_tree, read_steps, train

from ultrafuser_mega.baselines.derived import steps_of_both_stages
from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.batches import sampler_of
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.records import read_metrics
from ultrafuser_mega.training.prepare import ended_by_epochs, prepare

ROWS = 3 * 60  # of the trio's training data


def short(trio: Path, runs: Path) -> dict[str, Any]:
    """Stage 2 alone, of the gate, which one rank goes through in seconds."""
    tree = config_tree(trio, runs, ONE)
    tree["stage1"]["steps"] = 0
    tree["stage2"] |= {"samples_per_class": 4, "train": {"specialists": "frozen", "heads": "frozen"}}
    tree["evaluation"] = {"every": 1, "samples_per_class": 1, "token_views": 0}
    return tree


def test_a_stage_ends_by_epochs_and_a_resumed_one_where_it_would_have(trio: Path, tmp_path: Path) -> None:
    tree = short(trio, tmp_path)
    tree["stage2"] |= {"steps": 1000, "epochs": 0.25}
    tree["checkpoint"] = {"every": 1, "keep": 9}
    run = train(tree, 1)
    assert len(read_steps(run)) == 4  # 0.25 x 180 / 12, rounded up
    last = list_checkpoints(run / "checkpoints")
    assert last[-1][0] == Progress(2, 4)
    rates = [step["lr"] for step in read_steps(run)]
    last[-1][1].rename(tmp_path / "aside")
    last[-2][1].rename(tmp_path / "aside2")
    train(tree, 1, resume=True)
    assert [step["lr"] for step in read_steps(run)] == rates
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


def test_a_stage_without_progress_ends_early_and_its_best_checkpoint_stays(trio: Path, tmp_path: Path) -> None:
    tree = short(trio, tmp_path)
    tree["stage2"] |= {"steps": 40, "lr": 3.0, "warmup_steps": 0, "schedule": "constant"}  # leaps over any lowest loss
    tree["evaluation"] |= {"patience": 2}
    tree["checkpoint"] = {"every": 0, "keep": 1, "keep_best": True}
    run = train(tree, 1)
    _, evals = read_metrics(run)
    losses = {record.step: record.mean["fused"] for record in evals if record.stage == 2 and record.step}
    done = len(read_steps(run))
    assert done < 40
    best = min(losses, key=losses.__getitem__)
    assert done == best + 2
    kept = [path.name for _, path in list_checkpoints(run / "checkpoints")]
    assert kept == [Progress(2, best).folder, Progress(2, done).folder]
    assert (run / "checkpoints" / "best").resolve().name == Progress(2, best).folder
    assert json.loads((run / "summary.json").read_text())["steps"] == done
    # A run that ended behind its best checkpoint and before the evaluation that says so.
    shutil.rmtree(run / "checkpoints" / Progress(2, done).folder)
    (run / "checkpoints" / "best").unlink()
    train(tree, 1, resume=True)
    assert (run / "checkpoints" / "best").resolve().name == Progress(2, best).folder
    assert len(read_steps(run)) == done


def test_epochs_that_end_within_the_warm_up_are_refused_and_counted_before(trio: Path, tmp_path: Path) -> None:
    tree = short(trio, tmp_path)
    tree["stage2"] |= {"steps": 1000, "epochs": 0.25, "warmup_steps": 5}
    config = FuserConfig.model_validate(tree)
    with pytest.raises(InputError, match=r"^stage2\.epochs: how many steps they are, prepared data say, and "):
        steps_of_both_stages(config)
    plan = preflight(config, 1, resume=False)
    prepare(config, plan.vocab_size)
    with pytest.raises(
        InputError, match=r"^stage2\.warmup_steps: 5 is more than the stage's 4 steps.*as stage2\.epochs"
    ):
        ended_by_epochs(plan, TokenStore.open(config.store_dir))
    tree["stage2"]["warmup_steps"] = 1
    assert steps_of_both_stages(FuserConfig.model_validate(tree)) == 4


def test_a_run_without_a_second_stage_takes_no_heed_of_what_that_would_train(trio: Path, tmp_path: Path) -> None:
    tree = short(trio, tmp_path)
    tree["stage1"] |= {"steps": 1, "train": {"gate": "frozen", "text": "lora"}}
    tree["stage2"] |= {"steps": 0, "train": {"specialists": "lora"}}
    assert len(read_steps(train(tree, 1))) == 1


def test_files_of_a_class_are_drawn_by_their_weights(trio: Path, tmp_path: Path) -> None:
    tree = short(trio, tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("text", "code", "math"):
        (data / f"{name}.train.jsonl").write_text((trio / "data" / f"{name}.train.jsonl").read_text())
        (data / f"{name}.heldout.jsonl").write_text((trio / "data" / f"{name}.heldout.jsonl").read_text())
    lines = (data / "code.train.jsonl").read_text().splitlines(keepends=True)
    (data / "rare.jsonl").write_text("".join(line.replace("{", '{"n": 1, ', 1) for line in lines[:10]))
    (data / "code.train.jsonl").write_text("".join(lines[10:]))
    tree["data"] |= {"root": str(data)}
    tree["data"]["classes"]["code"] |= {
        "train": ["rare.jsonl", "code.train.jsonl"],
        "weights": {"rare.jsonl": 1, "code.train.jsonl": 1},
    }
    tree["stage2"]["steps"] = 2
    run = train(tree, 1)
    store = TokenStore.open(run / "store")
    rare, often = store.entry_samples("code", 2)
    assert 0 < rare <= 10 < often and rare + often == len(store.split("code", "train"))
    data_of = FuserConfig.model_validate(tree).data
    sampler = sampler_of(store, data_of.sampling, 4, 0, data_of.file_weights)
    drawn = [row for step in range(10) for name, row in sampler.batch(step) if name == "code"]
    assert sum(row < rare for row in drawn) == len(drawn) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"a.jsonl": 1}}, "weights weighs a.jsonl; it must weigh exactly code.train.jsonl"),
        ({"weights": {"code.train.jsonl": 0}}, "no entry has a weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(trio: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tree = short(trio, tmp_path)
    tree["data"]["classes"]["code"] |= change
    with pytest.raises(ValueError, match=message):
        FuserConfig.model_validate(tree)
