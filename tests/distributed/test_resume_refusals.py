"""What --resume refuses, in one line and before any rank starts work, and what it only remarks on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launched import launch
from support.trio import DISJOINT_3, ONE, config_tree, read_steps, train

from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.launch.rank import train_main
from ultrafuser_mega.planning.preflight import RunPlan, compared_with_data, preflight
from ultrafuser_mega.training.prepare import prepare

STAGE1, STAGE2 = "stage1-step0000002", "stage2-step0000002"


@pytest.fixture(scope="module")
def tree(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Configuration of a finished run of two steps in each stage; under bf16 checkpoints hold most: master weights."""
    tree = config_tree(trio, tmp_path_factory.mktemp("runs"), ONE) | {"dtype": "bf16"}
    tree["stage1"] |= {"steps": 2}
    tree["stage2"] |= {"steps": 2}
    tree["evaluation"] = {"samples_per_class": 3, "token_views": 0}
    train(tree, 1)
    return tree


@pytest.fixture
def copied(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same over a copy of the run folder."""
    shutil.copytree(Path(tree["runs"]), tmp_path / "runs")
    return tree | {"runs": str(tmp_path / "runs")}


def checkpoints(tree: dict[str, Any]) -> Path:
    return FuserConfig.model_validate(tree).run_dir / "checkpoints"


def resume(tree: dict[str, Any]) -> RunPlan:
    return preflight(FuserConfig.model_validate(tree), 1, resume=True)


def stage(tree: dict[str, Any], number: int, **changes: Any) -> dict[str, Any]:
    return {f"stage{number}": tree[f"stage{number}"] | changes}


def test_same_configuration_goes_on_without_a_remark(tree: dict[str, Any]) -> None:
    plan = resume(tree)
    assert plan.resume == (Progress(2, 2), checkpoints(tree) / STAGE2)
    assert plan.changes == ()


@pytest.mark.parametrize(("was", "other"), [("bf16", "fp32"), ("fp32", "bf16")])
@pytest.mark.parametrize("newest", [STAGE1, STAGE2])
def test_other_dtype_is_refused_and_the_right_one_named(
    copied: dict[str, Any], newest: str, was: str, other: str
) -> None:
    if newest == STAGE1:
        shutil.rmtree(checkpoints(copied) / STAGE2)
    written = checkpoints(copied) / newest / "sources" / "config.yaml"
    written.write_text(written.read_text().replace("dtype: bf16", f"dtype: {was}"))
    message = (
        f"dtype: {other} cannot go on from {checkpoints(copied) / newest}, which was trained with dtype {was}; "
        f"set dtype={was}"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        resume(copied | {"dtype": other})


def test_other_stage1_steps_are_refused_once_stage_2_has_begun(tree: dict[str, Any]) -> None:
    for steps in (1, 5):
        with pytest.raises(InputError, match=rf"^stage1\.steps: {steps} cannot .* did 2 steps .*set stage1\.steps=2$"):
            resume(tree | stage(tree, 1, steps=steps))


def test_fewer_steps_than_are_done_are_refused(copied: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^stage2\.steps: 1 is less than the 2 steps that .*; set stage2\.steps to 2"):
        resume(copied | stage(copied, 2, steps=1))
    shutil.rmtree(checkpoints(copied) / STAGE2)
    with pytest.raises(InputError, match=r"^stage1\.steps: 1 is less than the 2 steps that .*; set stage1\.steps to 2"):
        resume(copied | stage(copied, 1, steps=1))


def test_stage_2_may_become_longer(copied: dict[str, Any]) -> None:
    longer = copied | stage(copied, 2, steps=3)
    assert resume(longer).changes == ("note: stage2.steps is 3, the run had 2",)
    assert [step["step"] for step in read_steps(train(longer, 1, resume=True))] == [1, 2, 3, 4, 5]


def test_stage_1_may_become_longer_while_it_lasts(copied: dict[str, Any]) -> None:
    shutil.rmtree(checkpoints(copied) / STAGE2)
    steps = read_steps(train(copied | stage(copied, 1, steps=3), 1, resume=True))
    assert [(step["stage"], step["step"]) for step in steps] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)]


def test_every_changed_setting_that_matters_is_remarked_on(copied: dict[str, Any]) -> None:
    shutil.rmtree(checkpoints(copied) / STAGE2)
    changed = copied | stage(copied, 2, lr=1e-4, schedule="constant") | stage(copied, 1, lr=1e-3)
    changed["data"] = changed["data"] | {"sampling": {"text": 2, "code": 1, "math": 0.5}}
    changed |= {"seed": 5, "loss": {"z_loss": 1e-3}, "optimizer": {"beta2": 0.99}}
    changed |= {"name": "run", "layouts": [{"kind": "colocated"}], "checkpoint": {"every": 7}}
    assert set(resume(changed).changes) == {
        "note: seed is 5, the run had 1234",
        "note: data.sampling is {code: 1, math: 0.5, text: 2}, the run had balanced",
        "note: loss.z_loss is 0.001, the run had 0.0",
        "note: optimizer.beta2 is 0.99, the run had 0.95",
        "note: stage1.lr is 0.001, the run had 0.005",
        "note: stage2.lr is 0.0001, the run had 0.0005",
        "note: stage2.schedule is constant, the run had cosine",
    }


def test_settings_of_a_stage_that_is_over_are_not_remarked_on(tree: dict[str, Any]) -> None:
    assert resume(tree | stage(tree, 1, lr=1e-3)).changes == ()


def test_remarks_are_printed_once_when_the_run_goes_on(copied: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(copied | {"layouts": [DISJOINT_3]}, sort_keys=False))
    codes, printed = launch(train_main, tmp_path, tmp_path / "config.yaml", ["seed=5"], True)
    assert codes == [0, 0, 0]
    assert printed.count("note: seed is 5, the run had 1234\n") == 1


def with_data(tree: dict[str, Any]) -> tuple[str, ...]:
    """What a resumed run remarks on, its data included."""
    plan = resume(tree)
    return compared_with_data(plan, TokenStore.open(plan.config.store_dir)).changes


def prepared_again(tree: dict[str, Any], folder: Path, *files: str) -> dict[str, Any]:
    """``tree`` over a copy of its data, prepared with --overwrite, in which these files have lost their last row."""
    shutil.copytree(tree["data"]["root"], folder)
    for file in files:
        rows = (folder / file).read_text().splitlines(keepends=True)
        (folder / file).write_text("".join(rows[:-1]))
    tree = tree | {"data": tree["data"] | {"root": str(folder)}}
    prepare(FuserConfig.model_validate(tree), resume(tree).vocab_size, overwrite=True)
    return tree


def evaluating(tree: dict[str, Any], samples: int) -> dict[str, Any]:
    return tree | {"evaluation": tree["evaluation"] | {"samples_per_class": samples}}


def test_data_that_only_moved_are_not_remarked_on(copied: dict[str, Any], tmp_path: Path) -> None:
    assert with_data(copied) == ()
    assert with_data(prepared_again(copied, tmp_path / "moved")) == ()


def test_other_training_data_are_remarked_on(copied: dict[str, Any], tmp_path: Path) -> None:
    changed = prepared_again(copied, tmp_path / "data", "text.train.jsonl", "math.train.jsonl")
    assert with_data(changed) == ("note: the training samples of text, math are not those that the run had",)


def test_other_held_out_data_are_refused_in_stage_2(copied: dict[str, Any], tmp_path: Path) -> None:
    changed = prepared_again(copied, tmp_path / "data", "code.heldout.jsonl")
    with pytest.raises(
        InputError, match=rf"^data: the held-out samples of code are other ones; .*{STAGE2} is in stage 2, and"
    ):
        with_data(changed)
    shutil.rmtree(checkpoints(copied) / STAGE2)
    assert with_data(changed) == (
        "note: the held-out samples of code are not those that the run had; all models are evaluated anew",
    )


def test_another_number_of_held_out_samples_is_refused_in_stage_2(tree: dict[str, Any]) -> None:
    with pytest.raises(
        InputError,
        match=r"^evaluation\.samples_per_class: 5, the run had 3; set evaluation\.samples_per_class=3, or start a run",
    ):
        with_data(evaluating(tree, 5))


def test_a_number_that_takes_the_same_held_out_samples_is_not_refused(copied: dict[str, Any], tmp_path: Path) -> None:
    config = checkpoints(copied) / STAGE2 / "sources" / "config.yaml"
    config.write_text(config.read_text().replace("samples_per_class: 3", "samples_per_class: 12"))
    assert with_data(evaluating(copied, 500)) == ()  # there are 12


def test_all_rows_of_the_table_are_of_the_samples_of_a_run_resumed_in_stage_1(copied: dict[str, Any]) -> None:
    shutil.rmtree(checkpoints(copied) / STAGE2)
    changed = evaluating(copied, 5)
    assert with_data(changed) == (
        "note: evaluation.samples_per_class is 5, the run had 3; all models are evaluated anew",
    )
    run_dir = train(changed, 1, resume=True)
    evals = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evals = [record for record in evals if record["kind"] == "eval"]
    assert [(record["stage"], record["step"]) for record in evals] == [(1, 0), (1, 2), (2, 4)]
    summary = json.loads((run_dir / "summary.json").read_text())["eval"]
    for name in ("text", "code", "math"):
        for specialist in ("text", "code", "math"):
            assert summary[name][specialist] == evals[1]["loss"][name][specialist]  # of 5 samples, untrained
            assert summary[name][specialist] != evals[0]["loss"][name][specialist]  # of 3


def test_a_checkpoint_without_a_record_of_its_data_goes_on_with_a_remark(copied: dict[str, Any]) -> None:
    path = checkpoints(copied) / STAGE2
    (path / "sources" / "data.json").unlink()
    progress = json.loads((path / "progress.json").read_text())
    del progress["files"]["sources/data.json"]
    (path / "progress.json").write_text(json.dumps(progress))
    note = f"note: {path} does not say what data the run had; they are taken to be those of now"
    assert with_data(copied) == (note,)
    with pytest.raises(InputError, match=r"^evaluation\.samples_per_class: 5, the run had 3; "):
        with_data(evaluating(copied, 5))
    train(copied | stage(copied, 2, steps=3), 1, resume=True)


def test_damaged_record_of_the_data_is_named(copied: dict[str, Any]) -> None:
    path = checkpoints(copied) / STAGE2 / "sources" / "data.json"
    for text in ("{", "[]", '{"fingerprint": "x"}'):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: damaged \(.*\); copy the checkpoint again"):
            with_data(copied)


@pytest.mark.parametrize("name", [STAGE1, STAGE2])
def test_renamed_checkpoint_is_refused_with_its_right_name(copied: dict[str, Any], name: str) -> None:
    (checkpoints(copied) / name).rename(checkpoints(copied) / "stage2-step0000009")
    with pytest.raises(InputError, match=rf"/stage2-step0000009: renamed: .* that of {name}; give it this name back$"):
        resume(copied)


@pytest.mark.parametrize("text", ["a: [", "just words", json.dumps({"dtype": "fp32"})])
def test_a_damaged_configuration_in_a_checkpoint_is_named_and_the_older_one_taken(
    copied: dict[str, Any], text: str
) -> None:
    path = checkpoints(copied) / STAGE2 / "sources" / "config.yaml"
    problem = rf"^{re.escape(str(path))}: damaged \(.*\)"
    path.write_text(text)
    plan = resume(copied)
    assert plan.resume == (Progress(1, 2), checkpoints(copied) / STAGE1)
    assert re.search(rf"{problem}; goes on from {STAGE1}$", plan.changes[0])
    shutil.rmtree(checkpoints(copied) / STAGE1)
    with pytest.raises(
        InputError, match=rf"{problem}; copy the checkpoint again, or remove {STAGE2} and start afresh: "
    ):
        resume(copied)
