"""``ultrafuser evaluate`` as people call it: several models of one release on small files of real forms."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.command import ultrafuser
from support.interruptible import start_interruptible
from support.played_endpoint import Server, said

from ultrafuser_mega.checkpoint.unfinished import alone
from ultrafuser_mega.errors import EXIT_BAD_INPUT

GSM8K = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(2, 8)]
MT_BENCH = [{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}]
FILES: dict[str, list[dict[str, Any]]] = {
    "gsm8k_test": GSM8K,
    "mt_bench_question": MT_BENCH,
    "alpaca_eval_instructions": [{"instruction": "Write."}],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, given in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return folder


def rows(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(model, benchmark, item) -> its line of samples.jsonl, without what is another each time."""
    found = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for row in found:
        del row["seconds"]
    return {(row["model"], row["benchmark"], row["item"]): row for row in found}


def test_a_second_evaluation_into_the_same_folder_is_refused_in_one_line(
    release: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("evaluate", f"{release}@text", "--suite", "gsm8k", "--data", data, "--out", out, "--limit", "1")
    out.mkdir()
    with alone(out):
        assert ultrafuser(monkeypatch, *command) == EXIT_BAD_INPUT
    assert f"error: {out}: another process writes to this name" in capsys.readouterr().err
    assert not any(out.iterdir())


@pytest.mark.parametrize("trio", ["qwens"], indirect=True)
def test_models_stand_beside_each_other_with_oracle_and_rules(
    release: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    models = [f"fused={release}", f"text={release}@text", f"plain={release}+uniform"]
    options = ("--suite", "gsm8k,mt_bench", "--data", data, "--out", out, "--oracle", "text,fused", "--single", "plain")
    short = ("--limit", "3", "--max-new-tokens", "8")
    assert ultrafuser(monkeypatch, "evaluate", *models, *options, *short) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in ("fused", "text", "plain", "oracle of text, fused"))
    found = rows(out)
    assert len(found) == 3 * (3 + 1)
    of_fused = found["fused", "mt_bench", "mt_bench/81"]
    assert set(of_fused["gate"]) == {"text", "code", "math"} and len(of_fused["replies"]) == 2
    assert found["text", "mt_bench", "mt_bench/81"]["gate"] == {}
    results = json.loads((out / "results.json").read_text())
    assert set(results["models"]) == {"fused", "text", "plain", "oracle of text, fused"}
    assert set(results["headroom"]["models"]) == {"fused", "text"}
    assert (out / "results.md").is_file() and list((out / "plots").glob("*.png"))


@pytest.mark.parametrize("trio", ["qwens"], indirect=True)
def test_what_the_harness_asks_and_scores_stands_in_the_same_table(
    release: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    row = {"question": "2 + 2?", "options": ["(A)4", "(B)5", "(C)6", "(D)7"], "label": "A", "passage": None}
    (data / "agieval_sat-math.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    out = tmp_path / "out"
    options = ("--suite", "standard_sat_math,gsm8k", "--data", data, "--out", out, "--limit", "2")
    for models in ([f"fused={release}"], [f"fused={release}", f"text={release}@text"]):  # the second goes on
        assert ultrafuser(monkeypatch, "evaluate", *models, *options, "--max-new-tokens", "4") == 0
    assert "| SAT-Math (harness) accuracy |" in capsys.readouterr().out
    found = {key: row for key, row in rows(out).items() if key[1] == "standard_sat_math"}
    assert len(found) == 2 * 2
    for likely in found.values():
        assert likely["turns"] == ["Q: 2 + 2? Answer Choices: (A)4 (B)5 (C)6 (D)7\nA: Among A through D, the answer is"]
        likelihoods = [float(text) for text in likely["replies"]]
        assert likely["score"] == float(likelihoods.index(max(likelihoods)) == 0)


@pytest.mark.parametrize("trio", ["qwens"], indirect=True)
def test_what_a_model_cannot_be_asked_is_said(
    release: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (data / "gsm8k_test.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1 + 1? " * 20_000, "answer": "#### 2"}) + "\n")
    out = tmp_path / "out"
    options = ("--suite", "gsm8k", "--data", data, "--out", out, "--max-new-tokens", "4")
    assert ultrafuser(monkeypatch, "evaluate", f"a={release}", *options) == 0
    line = "a: 1 items of gsm8k could not be asked, and count as wrong: "
    assert line in capsys.readouterr().out and line in (out / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no such folder"),
        (("a={release}", "a={release}+uniform"), "MODEL a: stands twice; give the second another name"),
        (("{release}", "--suite", "poetry"), "'poetry': there is no such suite or benchmark; suites are"),
        (("{release}", "--suite", "aqua"), "agieval_aqua-rat.jsonl"),
        (("{release}", "--suite", "standard"), "TruthfulQA.csv: no such file; standard_truthfulqa_mc1 needs it"),
        (("{release}", "--select", "a,b"), "--select, --opponent, --judge-price: belong to --judge; give one"),
        (("{release}", "--single", "text"), "--single: the headroom from it goes to --oracle; give that too"),
        (("{release}", "--suite", "gsm8k,gsm8k"), "--suite gsm8k,gsm8k: gsm8k stands twice; name it once"),
        (("={release}",), "a name is missing; expected NAME=ADDRESS"),
        (("a={release}", "--oracle", "a,b"), "--oracle b: is no row of this table; choose of a"),
        (
            ("{release}", "--suite", "alpacaeval", "--judge", "file:none"),
            "alpaca_eval_instructions.jsonl: its rows have no output",
        ),
        (("openai:gpt",), "expected openai:MODEL@URL"),
        (("a={release}", "--oracle", ","), "--oracle : is no row of this table; choose of a"),
        (("{release}", "--judge", "gpt-4"), "--judge 'gpt-4': write openai:MODEL"),
        (("{release}", "--judge", "openai:gpt-4"), "set OPENAI_API_KEY, or name an endpoint"),
        (("{release}", "--judge", "file:{release}/config.json"), "config.json:1: is no line of a ledger"),
        (("{release}", "--judge", "file:{release}"), "is a folder; name a file, which need not be there yet"),
        (("{release}", "--judge", "file:none", "--judge-price", "1", "nan"), "--judge-price 1 nan: a price is"),
        (("openai:gpt@http://[::1/v1",), "http://[::1/v1 is no address"),
        (("a\nb={release}",), "its name holds what cannot be printed"),
    ],
)
@pytest.mark.parametrize("trio", ["qwens"], indirect=True)
def test_bad_input_is_one_line(
    release: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    filled = [argument.format(release=release) for argument in arguments]
    suite = () if "--suite" in arguments else ("--suite", "gsm8k")
    assert ultrafuser(monkeypatch, "evaluate", *filled, *suite, "--data", data, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("trio", ["qwens"], indirect=True)
def test_an_endpoint_answers_beside_a_model_and_a_judge_grades_and_picks(
    release: Path,
    data: Path,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        asked = body["messages"][-1]["content"]
        if body["model"] == "judge":
            return said("response set 1" if "response set 1" in asked else "[[8]]")
        number = asked.removeprefix("What is ").split(" ")[0]
        return said(f"#### {2 * int(number)}" if number.isdigit() else "well")

    server.answer = answer
    out = tmp_path / "out"
    models = (f"there=openai:m@{server.url}", f"here={release}")
    options = ["--suite", "gsm8k,mt_bench", "--data", data, "--out", out, "--limit", "3", "--max-new-tokens", "4"]
    judging = ["--judge", f"openai:judge@{server.url}", "--judge-price", 1, 2, "--select", "there,here"]
    assert ultrafuser(monkeypatch, "evaluate", *models, *options, *judging) == 0
    said_last = capsys.readouterr().out
    assert "judge judge@" in said_last and "in the unit of the prices" in said_last
    found = rows(out)
    assert {key[2]: row["score"] for key, row in found.items() if key[:2] == ("there", "gsm8k")} == {
        key[2]: 1.0 for key in found if key[:2] == ("there", "gsm8k")
    }
    results = json.loads((out / "results.json").read_text())
    assert results["models"]["there"]["scores"]["mt_bench"]["mean"] == 0.8
    assert "selected of there, here" in results["models"]
    before = len(server.seen)
    assert ultrafuser(monkeypatch, "evaluate", *models, *options, *judging) == 0
    assert len(server.seen) == before  # answers and verdicts are there already


@pytest.mark.slow
@pytest.mark.parametrize("trio", ["qwens"], indirect=True)
def test_two_ranks_that_were_interrupted_go_on_and_answer_as_one(
    release: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    options = ("--suite", "gsm8k", "--data", data, "--batch-size", "1", "--max-new-tokens", "64")
    assert ultrafuser(monkeypatch, "evaluate", f"m={release}", *options, "--out", alone) == 0
    command = [sys.executable, "-m", "ultrafuser_mega", "evaluate", f"m={release}", *map(str, options)]
    command += ["--out", str(shared), "--ranks", "2"]
    process = start_interruptible(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not any(path.stat().st_size for path in shared.glob("samples.*.jsonl")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == (f"interrupted at once; what was answered is in {shared}; the same command goes on")
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert rows(shared) == rows(alone)
