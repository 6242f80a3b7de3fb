"""tools/compare_variants.py: which runs it makes of what was asked, and what its pages say of made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduction.compare import Comparing, compare_adapters, compare_students
from reproduction.measured import Measured, recovered
from reproduction.rows import AVERAGE, ULTRAFUSER
from reproduction.trios import Trio
from reproduction.variants import LABELS, LESSONS, OWN_FIRST, TRAINED, Compared, adapters, parse_rows, students
from reproduction.variants_page import Cost, adapters_page, best_single, students_page

from ultrafuser_mega.baselines.derived import steps_of_both_stages
from ultrafuser_mega.config import dump_config, load_config
from ultrafuser_mega.errors import InputError


@pytest.fixture
def trio(tmp_path: Path) -> Trio:
    settings = [f"runs={tmp_path / 'runs'}", "stage2.gate_lr=3e-3"]
    return Trio(0, tmp_path, load_config(None, settings), tmp_path / "base", None)


def lost(m: Measured, row: str, *means: float) -> None:
    m.losses[row] = {"text": list(means), "code": list(means), "mean": list(means)}


@pytest.fixture
def measured() -> Measured:
    m = Measured([0, 1], ["text", "code"], ["text", "code"])
    lost(m, "text", 4.0, 4.0)
    lost(m, "code", 4.2, 4.2)
    lost(m, AVERAGE, 3.5, 3.7)
    lost(m, LABELS, 3.0, 3.2)
    lost(m, "forward KL", 2.5, 2.4)
    lost(m, ULTRAFUSER, 2.0, 2.2)
    lost(m, "oracle per sample", 1.9, 2.1)
    return m


def test_rows_are_kinds_with_or_without_a_rate() -> None:
    first, second = parse_rows("forward KL@2e-3, on-policy", LESSONS)
    assert (str(first), first.key, first.rate) == ("forward KL, 0.002", "forward-KL-0.002", ("stage2.lr=0.002",))
    assert (str(second), second.rate) == ("on-policy", ())
    assert [row.kind for row in parse_rows("", TRAINED)] == list(TRAINED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sideways KL", "no such kind; use labels"),
        ("on-policy@fast", "a rate behind @"),
        ("on-policy@nan", "on-policy@nan: expected a rate behind @"),
        ("on-policy@-1e-3", "expected a rate behind @"),
        ("on-policy@1e-3,on-policy@0.001", "on-policy@0.001: stands twice"),
    ],
)
def test_rows_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_rows(text, LESSONS)


def test_what_would_fail_behind_hours_is_refused_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--seeds 0,1,0: .*give each seed once"):
        Comparing.of(out, "0,1,0", False, None, "", 1, [])
    with pytest.raises(InputError, match=r"--into law: there is no such specialist; use text, code, math"):
        compare_students(Comparing.of(out, "0", False, None, "", 1, [], "law"))
    run = tmp_path / "demo"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"--base .*/none: holds no config\.json"):
        Comparing.of(out, "0", False, run, "", 1, [], "text", tmp_path / "none")
    assert not out.exists()


def test_other_held_out_samples_than_those_of_the_given_run_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    config = load_config(None, [f"runs={tmp_path / 'runs'}", "evaluation.samples_per_class=30"])
    (run / "config.yaml").write_text(dump_config(config))
    (run / "summary.json").write_text("{}")
    more = ["evaluation.samples_per_class=120"]
    with pytest.raises(InputError, match=r"samples_per_class=120: the run .*demo was evaluated on 30 .*leave it out"):
        compare_adapters(Comparing.of(tmp_path / "out", "0", False, run, "", 1, more))
    assert not (tmp_path / "out").exists()  # it may be asked again without


def test_all_students_begin_alike_and_only_the_lesson_differs(trio: Trio) -> None:
    runs = students(trio, Compared(parse_rows("", LESSONS), "math"))
    assert [one.row for one in runs] == [AVERAGE, "task arithmetic", *LESSONS]
    tuned, *distilled = runs[2:]
    assert tuned.command[:4] == ("baseline", "further-tuned", "--specialist", "math")
    for one in distilled:
        assert one.command[:4] == ("distil", str(trio.config.runs / "ultrafuser"), "--into", "math")
        assert set(LESSONS[one.row]) <= set(one.command)
    lessons = {setting for settings in LESSONS.values() for setting in settings}
    lessons |= {part for part in distilled[-2].command if part.startswith("distil.on_policy_after=")}
    settings = [
        {part for part in one.command if "=" in part and part not in lessons and not part.startswith("name=")}
        for one in distilled
    ]
    assert all(own == settings[0] for own in settings)


def test_own_data_come_first_in_half_of_the_steps_whatever_number_those_are(trio: Trio) -> None:
    (*_, labels, one) = students(trio, Compared(parse_rows(f"{LABELS},{OWN_FIRST}", LESSONS)))
    both = steps_of_both_stages(trio.config)
    assert f"distil.on_policy_after={both // 2}" in one.command
    assert not any(part.startswith("stage2.steps=") for part in (*labels.command, *one.command))
    assert one.result == trio.root / "models" / "own-then-on-policy" / "summary.json"
    (*_, labels, one) = students(trio, Compared(parse_rows(f"{LABELS},{OWN_FIRST}", LESSONS), steps=300))
    assert "distil.on_policy_after=150" in one.command
    for run in (labels, one):  # of further tuning both stages count
        assert {"stage1.steps=0", "stage2.steps=300"} <= set(run.command)
    assert one.result == trio.root / "models" / "own-then-on-policy-300-steps" / "summary.json"


def test_stage_2_begins_with_the_newest_checkpoint_of_stage_1_and_the_gates_own_rate(trio: Trio) -> None:
    compared = Compared(parse_rows("adapters of rank 8@1e-2", TRAINED))
    with pytest.raises(InputError, match="holds no checkpoint of stage 1"):
        adapters(trio, compared)
    for name in ("stage1-step0000010", "stage1-step0000020", "stage2-step0000030"):
        folder = trio.config.runs / "ultrafuser" / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text("{}")
    (one,) = adapters(trio, compared)
    assert f"checkpoint.start={folder.parent / 'stage1-step0000020'}" in one.command
    assert {"stage1.steps=0", "stage2.lr=0.01", "stage2.gate_lr=0.003"} <= set(one.command)


def test_every_kind_trains_what_it_is_called_whatever_the_given_run_trained(tmp_path: Path) -> None:
    train = "stage2.train={gate: {lr: 1e-3}, heads: frozen, specialists: lora}"
    config = load_config(None, [f"runs={tmp_path / 'runs'}", train])
    (config.runs / "ultrafuser" / "checkpoints" / "stage1-step0000010").mkdir(parents=True)
    (config.runs / "ultrafuser" / "checkpoints" / "stage1-step0000010" / "progress.json").write_text("{}")
    runs = adapters(Trio(0, tmp_path, config, tmp_path / "base", None), Compared(parse_rows("", TRAINED)))
    trained = {}
    for one in runs:
        settings = [part for part in one.command[3:] if "=" in part]
        parts = load_config(None, [train, *settings]).parts(2)
        assert parts["gate"].rates.lr == 1e-3
        trained[one.row] = [part.mode for part in parts.values()]
    assert trained["everything"] == ["full"] * 5
    assert trained["adapters of rank 32"] == trained["adapters of rank 8"] == ["full", "frozen", *["lora"] * 3]
    assert trained["gate and heads"] == ["full", "full", *["frozen"] * 3]


def test_the_best_single_model_is_one_that_learned_nothing_from_the_fused_one(measured: Measured) -> None:
    assert best_single(measured, ["forward KL"]) == LABELS
    assert recovered(measured.losses, LABELS, "forward KL", ULTRAFUSER) == pytest.approx([0.5, 0.8])
    assert recovered(measured.losses, LABELS, ULTRAFUSER, ULTRAFUSER) == [1.0, 1.0]


def test_the_page_of_students_holds_what_was_measured(measured: Measured, tmp_path: Path) -> None:
    text = students_page(tmp_path, measured, ["forward KL"], [LABELS], {"seeds": "0, 1"}).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| forward KL |"))
    assert line.endswith("| 0.65 ± 1.91 | 0.59 ± 1.73 |")
    assert json.loads((tmp_path / "students.json").read_text())["best_single"] == LABELS
    assert "Accuracy" not in text


def test_accuracies_are_shares_of_the_headroom_above_the_best_labels(measured: Measured, tmp_path: Path) -> None:
    oracle = "oracle of text, code"
    others = {LABELS: [0.1, 0.2], f"{LABELS}, 0.1": [0.1, 0.1], "forward KL": [0.3, 0.25]}
    for row, means in (others | {ULTRAFUSER: [0.5, 0.4], oracle: [0.5, 0.3], "text": [0.2, 0.2]}).items():
        measured.accuracies[row] = {"text": means, "mean": means}
    lost(measured, f"{LABELS}, 0.1", 3.1, 3.3)
    rows = [LABELS, f"{LABELS}, 0.1"]
    text = students_page(tmp_path, measured, ["forward KL"], rows, {}).read_text().split("## Accuracy")[1]
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert lines["| model"] == "| model | text | mean | of the headroom |"
    assert " | 0.50" in lines["| forward KL"]  # 0.2 of 0.4 and 0.05 of 0.1
    assert lines[f"| {LABELS}"].endswith(" |  |") and lines[f"| {oracle}"].endswith(" |  |")
    document = json.loads((tmp_path / "students.json").read_text())
    assert document["single_of_accuracies"] == LABELS
    assert document["recovered_accuracy"]["forward KL"] == {oracle: pytest.approx([0.5, 0.5])}
    assert document["recovered_accuracy"][ULTRAFUSER] == {oracle: pytest.approx([1.0, 2.0])}
    measured.accuracies[oracle]["mean"] = [0.5, 0.2]  # no headroom in a seed: there is no share
    students_page(tmp_path, measured, ["forward KL"], rows, {})
    assert json.loads((tmp_path / "students.json").read_text())["recovered_accuracy"] == {}


def test_the_page_of_adapters_holds_what_was_measured(measured: Measured, tmp_path: Path) -> None:
    cost = Cost(2**18, {"weights": 3 * 2**20, "gradients": 2**20, "optimizer": 2**21}, 0.25)
    lost(measured, "gate and heads", 2.6, 2.6)
    text = adapters_page(tmp_path, measured, {"gate and heads": cost}, {}).read_text()
    assert "| gate and heads | 2.600 | 2.600 | 2.600 | 262,144 | 3.0 | 6.0 | 3.0 | 0.25 |" in text
