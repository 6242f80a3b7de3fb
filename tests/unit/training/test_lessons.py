"""What a student's steps take: shares of three kinds of data, answers of teacher and student, runs that go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support.branched import branched_tree, write_branched
from support.trio import draw_nothing, read_steps

from ultrafuser_mega.baselines.distilled import STUDENT, distilled
from ultrafuser_mega.baselines.heldout import heldout_losses, load_model
from ultrafuser_mega.config import Distil, FuserConfig, dump_config, load_config
from ultrafuser_mega.convert.importer import import_specialists, plan_config
from ultrafuser_mega.data.answered import Given, answered_splits
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer_ids import answer_ids
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.records import read_metrics
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.lessons import read_answers
from ultrafuser_mega.training.run import run

CPU = torch.device("cpu")
STEPS = 10


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_branched(tmp_path_factory.mktemp("branched"))


@pytest.fixture(scope="module")
def teacher(branched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the trio with the gate that a run begins with."""
    folder = tmp_path_factory.mktemp("teacher")
    config = FuserConfig.model_validate(branched_tree(branched, folder / "runs"))
    import_specialists(plan_config(config, None), folder / "checkpoint")
    return folder / "checkpoint"


def distil(**options: object) -> Distil:
    return Distil.model_validate({"student": "s", "teacher": "t", **options})


def test_steps_take_kinds_of_data_in_their_shares() -> None:
    mixed = distil(data={"own": 2, "prompts": 1, "on_policy": 1})
    kinds = mixed.kinds(40)
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"own": 20, "prompts": 10, "on_policy": 10}
    for step in range(1, 41):  # none is ever a whole step or more behind its share
        assert kinds[:step].count("own") > step / 2 - 1 and kinds[:step].count("prompts") > step / 4 - 1
    assert all(mixed.kinds(step) == kinds[:step] for step in range(41))  # a run that is given more steps goes on
    assert set(distil().kinds(9)) == {"own"}
    with pytest.raises(ValidationError, match="data has no share above 0"):
        distil(data={"own": 0})


def test_on_policy_steps_wait_and_then_catch_up_with_their_share() -> None:
    halves = distil(data={"own": 1, "on_policy": 1}, on_policy_after=6)
    assert halves.kinds(12) == ["own"] * 6 + ["on_policy"] * 6
    assert halves.kinds(14)[12:] == ["own", "on_policy"]  # the shares are those of all steps
    assert all(halves.kinds(step) == halves.kinds(30)[:step] for step in range(31))
    kinds = distil(data={"own": 2, "prompts": 1, "on_policy": 1}, on_policy_after=9).kinds(40)
    assert [kinds[:9].count(kind) for kind in ("own", "prompts", "on_policy")] == [6, 3, 0]
    assert [kinds.count(kind) for kind in ("own", "prompts", "on_policy")] == [20, 10, 10]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"own": 1}, "on_policy_after: data.on_policy is 0"),
        ({"own": 0, "on_policy": 1}, "nothing is there to learn in the first 5 steps"),
    ],
)
def test_on_policy_steps_that_wait_for_nothing_or_never_come_are_refused(data: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        distil(data=data, on_policy_after=5)


def _trained(rank: int, path: Path, resume: bool) -> None:
    draw_nothing()
    config = load_config(path)
    run(preflight(config, 1, resume), CPU, answering=answer_ids)


@pytest.fixture(scope="module")
def mixed_run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> FuserConfig:
    """On-policy, own, prompts, on-policy, ..: the student answers before steps 0 (for 3 and 6 as well) and 9."""
    runs = tmp_path_factory.mktemp("runs")
    settings = ["data={own: 1, prompts: 1, on_policy: 1.01}", "refresh=3", "max_new_tokens=5", "sampling_temperature=0"]
    overrides = [f"runs={runs}", f"stage2.steps={STEPS}", "checkpoint.every=5", "evaluation.every=0"]
    made = distilled(teacher, "text", overrides=[*overrides, *(f"distil.{setting}" for setting in settings)])
    made.write_config()
    run_ranks(_trained, 1, made.config_path, False, timeout_s=240.0)
    return made.config


def test_answering_is_a_phase_of_the_step_before_which_it_happens(mixed_run: FuserConfig) -> None:
    steps = read_steps(mixed_run.run_dir)
    answered = [record["step"] - 1 for record in steps if "answering" in record["phases"]]  # phases of the step before
    assert answered == [1, 3]  # steps from 1; the student answers before the tenth, too, whose phases nobody reads


def test_answers_are_those_of_the_model_that_gives_them(branched: Path, teacher: Path, mixed_run: FuserConfig) -> None:
    """The teacher's of the checkpoint, the student's first ones of the folder that it begins as."""
    store = TokenStore.open(mixed_run.store_dir)
    for kind, model, names in [
        ("prompts", str(teacher), ["text", "code", "math"]),
        ("on_policy", f"{branched / 'text'}@ultralm", [STUDENT]),
    ]:
        answers = read_answers(mixed_run.run_dir / "answers" / f"{kind}-00000.jsonl", store.vocab_size)
        assert answers
        prompts = {}
        for row, (name, index) in enumerate(answers):
            sample = store.split(name, "train")[index]
            ids = {other: sample.prompts_of(other)[0].tolist() for other in names}
            room = store.max_length - max(len(turns[0]) for turns in sample.prompts.values())
            prompts[row] = ({"model": ids[STUDENT]} if kind == "on_policy" else ids, min(5, room))
        expected = answer_ids(model, prompts, temperature=0.0, seed=0, device=CPU)
        assert list(answers.values()) == list(expected.values())


def test_a_run_that_is_resumed_takes_the_same_steps_and_answers(mixed_run: FuserConfig) -> None:
    whole = [{"loss": step["loss"], "norm": step["grad_norm"]} for step in read_steps(mixed_run.run_dir)]
    answers = {path.name: path.read_text() for path in (mixed_run.run_dir / "answers").glob("*.jsonl")}
    assert len(whole) == STEPS and len(answers) == 1 + 2
    shutil.rmtree(mixed_run.run_dir / "checkpoints" / f"stage2-step{STEPS:07d}")  # back to 5: in the midst of answers
    run_ranks(_trained, 1, mixed_run.runs / f"{mixed_run.name}.yaml", True, timeout_s=240.0)
    again = [{"loss": step["loss"], "norm": step["grad_norm"]} for step in read_steps(mixed_run.run_dir)]
    assert again == whole
    assert {path.name: path.read_text() for path in (mixed_run.run_dir / "answers").glob("*.jsonl")} == answers


def test_on_policy_steps_behind_own_ones_go_on_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    """Own data in steps 0 and 1; the student answers before 2 (for 3 and 4 as well) and 5; stopped behind 4."""
    settings = ["data={own: 2, on_policy: 4}", "on_policy_after=2", "refresh=3", "max_new_tokens=5"]
    overrides = [f"runs={tmp_path}", "stage2.steps=6", "checkpoint.every=4", "evaluation.every=0"]
    made = distilled(teacher, "text", overrides=[*overrides, *(f"distil.{setting}" for setting in settings)])
    made.write_config()
    run_ranks(_trained, 1, made.config_path, False, timeout_s=240.0)
    folder = made.config.run_dir
    whole = [(step["loss"], step["grad_norm"]) for step in read_steps(folder)]
    answers = {path.name: path.read_text() for path in (folder / "answers").glob("*.jsonl")}
    assert len(whole) == 6 and sorted(answers) == ["on_policy-00000.jsonl", "on_policy-00001.jsonl"]
    shutil.rmtree(folder / "checkpoints" / "stage2-step0000006")
    (folder / "answers" / "on_policy-00001.jsonl").unlink()  # to be given again, by the same weights
    run_ranks(_trained, 1, made.config_path, True, timeout_s=240.0)
    assert [(step["loss"], step["grad_norm"]) for step in read_steps(folder)] == whole
    assert {path.name: path.read_text() for path in (folder / "answers").glob("*.jsonl")} == answers


def test_the_table_has_teacher_and_student_beside_what_was_trained(branched: Path, mixed_run: FuserConfig) -> None:
    _, evaluations = read_metrics(mixed_run.run_dir)
    store = TokenStore.open(mixed_run.store_dir)
    came = heldout_losses(load_model(branched / "text", CPU), store, mixed_run, STUDENT)
    for name, loss in came.items():
        first, last = evaluations[0].loss[name], evaluations[-1].loss[name]
        assert list(first) == ["fused", "text", "code", "math", "teacher", STUDENT]
        assert first["fused"] == first[STUDENT] == pytest.approx(loss, rel=1e-5)
        assert last["teacher"] == pytest.approx(first["teacher"], rel=1e-6) and last["fused"] != first["fused"]
    summary = json.loads((mixed_run.run_dir / "summary.json").read_text())
    assert summary["eval"]["text"][STUDENT] == evaluations[0].loss["text"][STUDENT]
    assert "distilled" in (mixed_run.run_dir / "results.md").read_text()


def test_answered_samples_keep_every_specialists_prompt(mixed_run: FuserConfig) -> None:
    store = TokenStore.open(mixed_run.store_dir)
    answers = {("code", 5): [7, 8], ("code", 2): [9], ("math", 0): [1, 2, 3]}
    splits = answered_splits(store, answers)
    assert {name: len(split) for name, split in splits.items()} == {"text": 0, "code": 2, "math": 1}
    sample = splits["code"][0]
    assert [ids.tolist() for ids in sample.responses] == [[7, 8]]
    for name, prompts in sample.prompts.items():
        assert [ids.tolist() for ids in prompts] == [store.split("code", "train")[5].prompts_of(name)[0].tolist()]
    given = Given([[("code", 2), ("math", 0)], [("code", 5)]], splits)
    assert [given.batch(0), given.batch(1)] == [[("code", 1), ("math", 0)], [("code", 0)]]
    assert given.taken(1) == {"code": 1.0, "math": 1.0}


@pytest.mark.parametrize("damage", ['"ids": []', '"ids": [3, 4', '"ids": [3, 400]', '"ids": [-1]', '"ids": 3', "{"])
def test_answers_that_are_damaged_are_refused_by_the_name_of_their_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "prompts-00000.jsonl"
    path.write_text(f'{{"class": "text", "index": 0, "ids": [3, 399]}}\n{{"class": "text", "index": 1, {damage}}}\n')
    with pytest.raises(InputError, match=rf"^{path}: damaged .*; remove it"):
        read_answers(path, 400)


def test_a_run_does_not_set_its_teacher_aside(teacher: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine" / "checkpoints" / "stage1-step0000000"
    shutil.copytree(teacher, own)
    made = distilled(own, "text", overrides=[f"runs={tmp_path}", "name=mine"])
    with pytest.raises(InputError, match=r"^distil\.teacher: .*is of an earlier run of this name.*than mine"):
        preflight(made.config, 1, resume=False)


@pytest.mark.parametrize(
    ("into", "overrides", "message"),
    [
        ("law", [], "--into law: expected one of text, code, math, or a Hugging Face folder"),
        ("text", ["stage1.steps=3"], "stage1.steps: the teacher's gate is trained already"),
        ("text", ["stage2.train.gate=full"], "stage2.train.gate: is the teacher's; set stage2.train.gate=frozen"),
        ("text", ["stage2.train.code=lora"], "stage2.train.code: is the teacher's; set stage2.train.code=frozen"),
        ("text", ["stage2.train.student.lr=-1"], "stage2.train.student.lr: Input should be greater than 0"),
        ("text", ["loss.z_loss=0.1"], "label_smoothing and z_loss have no meaning in distillation"),
        ("text", ["distil.student=law"], "distil.student: law must be one of two or more specialists"),
        ("text", ["distil.temprature=2"], "unknown key distil.temprature; did you mean distil.temperature"),
        ("text", ["distil.data={own: 0}"], "data has no share above 0"),
        (
            "text",
            ["distil.data.on_policy=1", "distil.on_policy_after=8", "stage2.steps=8"],
            "distil.on_policy_after: 8 leaves no on-policy step of stage2.steps=8; give less",
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused(teacher: Path, into: str, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        distilled(teacher, into, overrides=overrides)


def test_a_teacher_of_other_specialists_is_refused(teacher: Path, branched: Path, tmp_path: Path) -> None:
    tree = distilled(teacher, "text", overrides=[f"runs={tmp_path}"]).config.model_dump(mode="json")
    tree["specialists"].pop("math")
    with pytest.raises(InputError, match=r"distil\.teacher: .*checkpoint of another model: specialists\.math"):
        preflight(FuserConfig.model_validate(tree), 1, resume=False)


def test_a_run_that_becomes_longer_asks_for_the_answers_it_lacks(mixed_run: FuserConfig, tmp_path: Path) -> None:
    folder, runs = mixed_run.run_dir, tmp_path / "runs"
    shutil.copytree(folder, runs / folder.name)
    rows = TokenStore.open(mixed_run.store_dir).vocab_size
    before = read_answers(folder / "answers" / "prompts-00000.jsonl", rows)
    path = tmp_path / "longer.yaml"
    longer = mixed_run.stage2.model_copy(update={"steps": STEPS + 3})
    path.write_text(dump_config(mixed_run.model_copy(update={"runs": runs, "stage2": longer})))
    run_ranks(_trained, 1, path, True, timeout_s=240.0)
    assert len(read_steps(runs / folder.name)) == STEPS + 3
    after = read_answers(runs / folder.name / "answers" / "prompts-00000.jsonl", rows)
    assert before.items() < after.items()
