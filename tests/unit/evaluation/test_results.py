"""From samples to results.json and results.md: the paper's averages, what is judged, what waits, who is compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import NO_VERDICT, Benchmark, Sample
from ultrafuser_mega.evaluation.benchmarks import SUITES, benchmark
from ultrafuser_mega.evaluation.results import headroom, results, write_results
from ultrafuser_mega.evaluation.results_page import page, write_page

PAPER = [benchmark(name) for name in SUITES["paper"].benchmarks]
#: UltraFuser's table 1: the row of UltraLM-2 and its average.
ULTRALM = dict(zip(SUITES["paper"].benchmarks, (58.82, 83.23, 25.61, 25.09, 4.48, 25.00, 25.98), strict=False))


def sample(model: str, of: str, item: int, score: float | None, **other: object) -> Sample:
    plain = Sample(
        model=model,
        benchmark=of,
        item=f"{of}/{item}",
        group=f"{of}/{item}",
        category="",
        turns=("?",),
        replies=("!",),
        score=score,
        extracted="1",
        rule="",
        tokens=4,
        finish=("eos",),
    )
    return replace(plain, **other)  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for one in PAPER:
        (folder / one.source).write_text(one.name)
    return folder


def of_shares(model: str, shares: dict[str, float], count: int = 10_000) -> list[Sample]:
    """``count`` samples per benchmark, of which these percentages are right."""
    return [
        sample(model, name, item, float(item < round(share * count / 100)))
        for name, share in shares.items()
        for item in range(count)
    ]


def test_averages_are_those_of_the_papers_table(data: Path) -> None:
    found = results(of_shares("UltraLM-2", ULTRALM), PAPER[:-1], {}, data)["models"]["UltraLM-2"]
    means = {title: round(100 * cell["mean"], 2) for title, cell in found["averages"].items()}
    assert means == {"text": 71.03, "code": 25.61, "math": 20.14, "all exact": 27.5, "all": 35.46}  # the paper's 35.46
    judged = {title: cell["judged"] for title, cell in found["averages"].items()}
    assert judged == {"text": True, "code": False, "math": False, "all exact": False, "all": True}


def test_options_of_one_question_are_drawn_together(data: Path) -> None:
    truthful = [benchmark("truthfulqa")]
    apart = [sample("m", "truthfulqa", item, float(item % 10 < 3)) for item in range(200)]
    together = [replace(one, score=float(item // 5 % 10 < 3), group=str(item // 5)) for item, one in enumerate(apart)]
    cells = [results(s, truthful, {}, data)["models"]["m"]["scores"]["truthfulqa"] for s in (apart, together)]
    assert [(cell["mean"], cell["items"], cell["groups"]) for cell in cells] == [(0.3, 200, 200), (0.3, 200, 40)]
    widths = [cell["high"] - cell["low"] for cell in cells]
    assert widths[1] / widths[0] == pytest.approx(5**0.5, rel=0.1)


def ratings(model: str, score: float | None) -> list[Sample]:
    return [
        sample(model, "mt_bench", 1, 0.8, category="writing"),
        sample(model, "mt_bench", 2, 0.4, category="math"),
        sample(model, "mt_bench", 3, score, category="math"),
    ]


def two_models() -> list[Sample]:
    right = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    wrong = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    found = []
    for model, scores in (("fused", right), ("text", wrong)):
        found += [sample(model, "gsm8k", i, float(s), gate={"text": s / 4, "math": 1 - s / 4}, tokens=1 + 3 * s)
                  for i, s in enumerate(scores)]  # fmt: skip
        found += [sample(model, "alpacaeval", i, s / 2 + 0.25, extracted=None) for i, s in enumerate(scores)]
        found += ratings(model, 0.6)
    return found


MIXED: list[Benchmark] = [benchmark(name) for name in ("alpacaeval", "gsm8k", "mt_bench")]


def test_the_page_marks_what_is_judged_and_compares_pairs(data: Path) -> None:
    found = results(two_models(), MIXED, {"judge": "gpt-x"}, data)
    lines = page(found).splitlines()
    table = [line for line in lines if line.startswith(("| Model | Alpaca", "| fused | **", "| text | 30"))]
    assert table[0] == (
        "| Model | AlpacaEval Win Rate\u2020 | GSM8K Pass@1 | Avg. text\u2020 | Avg. math | Avg. all exact "
        "| Avg. all\u2020 |"
    )
    assert table[1].startswith("| fused | **60.00 (")
    assert any("scored by a judge (gpt-x)" in line for line in lines)
    assert "| Model | Writing | Math | Overall |" in lines and "| fused | 8.00 | 5.00 | 6.00 |" in lines
    # 7 of the 8 items that differ are the first model's: 2 (1 + 8) / 2^8, and as much for half of each difference
    pair = next(line for line in lines if line.startswith("| fused - text |"))
    assert pair.startswith("| fused - text | +30.0 (p 0.070) | +60.0 (p 0.070) | +0.00 (p 1.000) | +30.0 (")
    assert "| MT-Bench\u2020 | Avg. text\u2020 | Avg. math | Avg. all exact | Avg. all\u2020 |" in "".join(lines)
    assert "| fused: w_text | - | 0.226 | - |" in lines  # 7 * 4 tokens of 1/4, 3 of 0


def test_a_benchmark_that_is_called_as_an_average_is_has_a_column_of_its_own(data: Path) -> None:
    shares = {"one": {"sat_math": 30.0, "math": 10.0}, "other": {"sat_math": 50.0, "math": 10.0}}
    samples = [found for model, own in shares.items() for found in of_shares(model, own, 20)]
    lines = page(results(samples, [benchmark("sat_math"), benchmark("math")], {}, data)).splitlines()
    pair = next(line for line in lines if line.startswith("| one - other |"))
    assert pair.startswith("| one - other | -20.0 (p 0.125) | +0.0 (p 1.000) | -10.0 (")


def test_nothing_is_bold_where_all_are_alike(data: Path) -> None:
    samples = [*of_shares("one", {"math": 10.0}, 20), *of_shares("other", {"math": 10.0}, 20)]
    lines = page(results(samples, [benchmark("math")], {}, data)).splitlines()
    assert all("**" not in line for line in lines if line.startswith(("| one |", "| other |")))


def test_the_page_says_what_is_recovered_of_the_headroom_of_exact_scores(data: Path) -> None:
    text, fused = (of_shares(model, {"gsm8k": share}, 200) for model, share in (("text", 20.0), ("fused", 35.0)))
    oracle = of_shares("oracle", {"gsm8k": 50.0}, 200)
    judged = [sample(model, "alpacaeval", 1, 0.5) for model in ("text", "fused", "oracle")]
    samples = [*text, *fused, *oracle, *judged]
    found = headroom(samples, MIXED[:2], "text", "oracle")
    assert found is not None and found["average"] == "all exact" and list(found["models"]) == ["fused"]
    own = found["models"]["fused"]
    assert own["share"] == pytest.approx(0.5) and 0.3 < own["low"] < 0.5 < own["high"] < 0.7
    lines = page(results(samples, MIXED[:2], {}, data) | {"headroom": found}).splitlines()
    assert any(line.startswith("| fused | 50% | ") for line in lines)
    assert headroom(text, MIXED[:2], "text", "oracle") is None


def test_what_waits_for_a_judge_has_no_score_and_no_average(data: Path) -> None:
    samples = [replace(one, score=None) if one.benchmark == "alpacaeval" and one.item[-1] == "3" else one
               for one in two_models()]  # fmt: skip
    found = results([*samples[:20], *ratings("fused", None)], MIXED, {}, data)["models"]["fused"]
    assert found["scores"]["alpacaeval"]["mean"] is None and found["scores"]["alpacaeval"]["unjudged"] == 1
    assert set(found["averages"]) == {"math", "all exact"}
    assert found["categories"] == {"mt_bench": {"writing": 0.8, "math": None}}
    text = page(results([*samples[:20], *ratings("fused", None)], MIXED, {}, data))
    assert "| fused | - | 70.00 (" in text and "fused: 1 replies of alpacaeval wait for a judge." in text


def test_an_item_without_a_verdict_is_left_out_for_all(data: Path) -> None:
    samples = [replace(one, score=None, rule=NO_VERDICT) if (one.model, one.item) == ("text", "alpacaeval/9") else one
               for one in two_models()]  # fmt: skip
    found = results(samples, MIXED, {}, data)
    assert found["no_verdict"] == {"alpacaeval": 1}
    assert {own["scores"]["alpacaeval"]["items"] for own in found["models"].values()} == {9}
    assert found["models"]["text"]["scores"]["alpacaeval"]["mean"] == 0.25
    assert "1 items of alpacaeval are left out: no verdict." in page(found)


def test_models_that_answered_other_items_are_refused(data: Path) -> None:
    samples = [sample("a", "gsm8k", 1, 1.0), sample("a", "gsm8k", 2, 1.0), sample("b", "gsm8k", 1, 1.0)]
    with pytest.raises(InputError, match="gsm8k: a has answered gsm8k/2, b has not; evaluate both on the same items"):
        results(samples, [benchmark("gsm8k")], {}, data)


def test_what_stands_behind_a_score_is_told(data: Path) -> None:
    samples = [
        sample("m", "gsm8k", 1, 0.0, extracted=None, finish=("length",), tokens=512),
        sample("m", "gsm8k", 2, 1.0, tokens=12),
    ]
    cell = results(samples, [benchmark("gsm8k")], {}, data)["models"]["m"]["scores"]["gsm8k"]
    assert (cell["no_answer"], cell["cut"], cell["tokens"]) == (0.5, 0.5, 262)


def test_files_are_whole_and_note_digests_and_versions(data: Path, tmp_path: Path) -> None:
    found = results(two_models(), MIXED, {"seed": 3}, data)
    out = tmp_path / "out"
    kept = json.loads(write_results(out, found).read_text())
    assert kept == found and kept["settings"] == {"seed": 3} and kept["versions"]["python"]
    assert kept["data"]["gsm8k"] == {
        "file": "gsm8k_test.jsonl",
        "sha256": hashlib.sha256(b"gsm8k").hexdigest(),
    }
    text = write_page(out, found).read_text()
    plots = sorted(path.name for path in (out / "plots").iterdir())
    assert plots == ["lines.png", "scores.png"] and all(f"plots/{name}" in text for name in plots)
    assert sorted(path.name for path in out.iterdir()) == ["plots", "results.json", "results.md"]


def test_seven_benchmarks_make_a_radar(data: Path, tmp_path: Path) -> None:
    samples = [*of_shares("a", ULTRALM, 40), *of_shares("b", ULTRALM | {"math": 30.0}, 40)]
    write_page(tmp_path / "out", results(samples, PAPER[:-1], {}, data))
    assert (tmp_path / "out" / "plots" / "radar.png").is_file()
