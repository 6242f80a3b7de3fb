"""From samples to results.json: scores with intervals, averages as UltraFuser's table 1 makes them, paired tests.

An average counts every benchmark once, whatever its number of items; what is no percentage (MT-Bench's grades) stays
out of averages, and is reported by its items' categories. Averages of exact and of judged scores are never one number
without saying so: "all exact" is over the benchmarks that no judge scores, "all" over all, and whatever holds a judged
score has ``judged: true``. An item for which a judge has said nothing of one model is left out for all.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.evaluation.benchmark import NO_VERDICT, NOT_ASKED, Benchmark, Sample
from ultrafuser_mega.evaluation.statistics import LEVEL, Scores, holm, interval, less, paired_test, recovered
from ultrafuser_mega.files import write_atomically

RESULTS_FILE = "results.json"
_PACKAGES = (
    "ultrafuser_mega",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "math-verify",
    "sympy",
    "openai",
    "lm-eval",
)
_SEED = 0  # of the draws behind intervals and tests


@dataclass(frozen=True)
class Cell:
    """One model's score on one benchmark, or an average of such.

    Attributes:
        mean: 0 to 1; None while samples wait for a judge.
        low, high: 95 % interval.
        items: answered.
        groups: that were resampled.
        judged: whether a judge's scores are in it.
        unjudged: samples that wait for a judge.
        no_answer: share of replies in which no answer was found.
        cut: share of replies that ended at the limit of new tokens.
        tokens: per item, on average.
    """

    mean: float | None
    low: float | None
    high: float | None
    items: int
    groups: int
    judged: bool
    unjudged: int = 0
    no_answer: float = 0.0
    cut: float = 0.0
    tokens: float = 0.0


def results(
    samples: Iterable[Sample], benchmarks: Sequence[Benchmark], settings: Mapping[str, Any], data: Path
) -> dict[str, Any]:
    """All that results.json holds.

    Args:
        samples: of all models on all benchmarks.
        benchmarks: in the order of the table.
        settings: all that the scores depend on; as JSON has it.
        data: the folder with the benchmarks' files, whose digests are noted.

    Raises:
        InputError: two models answered different items of a benchmark.
    """
    samples = list(samples)
    by_place, void = _placed(samples)
    _check_same_items(by_place, benchmarks)
    models = {model: _model(own, benchmarks) for model, own in by_place.items()}
    known = _known(by_place, benchmarks)
    return {
        "settings": dict(settings),
        "statistics": {"interval": "BCa bootstrap over groups", "level": LEVEL, "test": "sign flips by group"},
        "versions": versions(),
        "data": {one.name: {"file": one.source, "sha256": sha256(data / one.source)} for one in benchmarks},
        "benchmarks": {
            one.name: {
                "title": one.title,
                "domain": one.domain,
                "metric": one.metric,
                "judged": one.judged,
                "scale": one.scale,
            }
            for one in benchmarks
        },
        "no_verdict": dict(Counter(benchmark for benchmark, _ in void)),
        "not_asked": _not_asked(samples),
        "models": models,
        "pairs": _pairs(known, benchmarks),
        "average_pairs": _average_pairs(known, benchmarks),
    }


def headroom(
    samples: Iterable[Sample], benchmarks: Sequence[Benchmark], single: str, oracle: str
) -> dict[str, Any] | None:
    """What every row recovers of the headroom between two others, as results.json has it.

    Args:
        samples: of all rows.
        benchmarks: of the table; what a judge scores is left out where anything else is there.
        single: the row where the headroom begins, as a further-tuned specialist's.
        oracle: the row where it ends.

    Returns:
        {"single", "oracle", "average", "models": row -> {"share", "low", "high"}}; shares and ends are None where they
        cannot be told. None: a row lacks a score.
    """
    titles = average_members(benchmarks)
    title = "all exact" if "all exact" in titles else "all"
    members = titles.get(title, [])
    known = _known(_placed(samples)[0], [one for one in benchmarks if one.name in members])
    whole = {model: [own[name] for name in members] for model, own in known.items() if set(members) <= own.keys()}
    if not members or not {single, oracle} <= whole.keys():
        return None
    models: dict[str, Any] = {}
    for model, own in whole.items():
        if model in (single, oracle):
            continue
        found = recovered(own, whole[single], whole[oracle], _SEED)
        ends = None if found is None else found.interval
        models[model] = {
            "share": None if found is None else found.share,
            "low": None if ends is None else ends.low,
            "high": None if ends is None else ends.high,
        }
    return {"single": single, "oracle": oracle, "average": title, "models": models}


def write_results(out: Path, found: Mapping[str, Any]) -> Path:
    """``found`` as ``out/results.json``."""
    path = out / RESULTS_FILE
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def versions() -> dict[str, str]:
    """Of Python, the machine and the packages that a score depends on."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with writing(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _placed(samples: Iterable[Sample]) -> tuple[dict[str, dict[str, list[Sample]]], set[tuple[str, str]]]:
    """Model -> benchmark -> its samples, and the (benchmark, item) that are left out of them: without a verdict."""
    samples = list(samples)
    void = {(sample.benchmark, sample.item) for sample in samples if sample.rule == NO_VERDICT}
    placed: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        if (sample.benchmark, sample.item) not in void:
            placed.setdefault(sample.model, {}).setdefault(sample.benchmark, []).append(sample)
    return placed, void


def _not_asked(samples: Iterable[Sample]) -> list[str]:
    """A line for every model and benchmark with items that it could not be asked, which have no right answer then."""
    found: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        if reasons := [finish for finish in sample.finish if finish.startswith(NOT_ASKED)]:
            found.setdefault((sample.model, sample.benchmark), []).append(reasons[0].removeprefix(NOT_ASKED))
    return [
        f"{model}: {len(reasons):,} items of {benchmark} could not be asked, and count as wrong: {reasons[0]}"
        for (model, benchmark), reasons in found.items()
    ]


def _check_same_items(by_place: Mapping[str, Mapping[str, list[Sample]]], benchmarks: Sequence[Benchmark]) -> None:
    for one in benchmarks:
        answered = {model: {s.item for s in own[one.name]} for model, own in by_place.items() if one.name in own}
        for first, second in combinations(answered, 2):
            if apart := answered[first] ^ answered[second]:
                item = min(apart)
                has, lacks = (first, second) if item in answered[first] else (second, first)
                raise InputError(
                    f"{one.name}: {has} has answered {item}, {lacks} has not; evaluate both on the same items"
                )


def _model(own: Mapping[str, list[Sample]], benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    scores = {one.name: _cell(own[one.name], one.judged) for one in benchmarks if one.name in own}
    parts = {
        one.name: _scores(own[one.name])
        for one in benchmarks
        if one.name in own and not own[one.name][0].category and scores[one.name].mean is not None
    }
    averages: dict[str, Cell] = {}
    for title, members in average_members(benchmarks).items():
        if all(name in parts for name in members):
            judged = any(one.judged for one in benchmarks if one.name in members)
            averages[title] = _average([parts[name] for name in members], judged)
    return {
        "scores": {name: asdict(cell) for name, cell in scores.items()},
        "averages": {title: asdict(cell) for title, cell in averages.items()},
        "categories": {name: found for name, samples in own.items() if (found := _categories(samples))},
        "gate": {name: weights for name, samples in own.items() if (weights := _gate(samples))},
    }


def average_members(benchmarks: Sequence[Benchmark]) -> dict[str, list[str]]:
    """Title of an average -> its benchmarks: every domain, all exact ones, and all."""
    averaged = [one for one in benchmarks if one.scale == 100.0]
    found: dict[str, list[str]] = {}
    for one in averaged:
        found.setdefault(one.domain, []).append(one.name)
    exact = [one.name for one in averaged if not one.judged]
    if exact and len(exact) < len(averaged):
        found["all exact"] = exact
    if averaged:
        found["all"] = [one.name for one in averaged]
    return found


def _cell(samples: Sequence[Sample], judged: bool) -> Cell:
    replies = [finish for sample in samples for finish in sample.finish]
    unjudged = sum(sample.score is None for sample in samples)
    cell = Cell(
        None,
        None,
        None,
        items=len(samples),
        groups=len({sample.group for sample in samples}),
        judged=judged,
        unjudged=unjudged,
        no_answer=0.0 if judged else fmean(sample.extracted is None for sample in samples),
        cut=fmean(finish == "length" for finish in replies) if replies else 0.0,
        tokens=fmean(sample.tokens for sample in samples),
    )
    if unjudged:
        return cell
    part = _scores(samples)
    ends = interval([part], _SEED)
    return replace(cell, mean=part.mean, low=ends.low, high=ends.high)


def _average(parts: Sequence[Scores], judged: bool) -> Cell:
    ends = interval(parts, _SEED)
    items, groups = (sum(values) for values in zip(*((int(p.counts.sum()), len(p.groups)) for p in parts), strict=True))
    return Cell(fmean(part.mean for part in parts), ends.low, ends.high, items, groups, judged)


def _scores(samples: Sequence[Sample]) -> Scores:
    ordered = sorted(samples, key=lambda sample: sample.item)
    return Scores.of([sample.score or 0.0 for sample in ordered], [sample.group for sample in ordered])


def _categories(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Category -> mean score, None while it waits for a judge."""
    found: dict[str, list[float | None]] = {}
    for sample in samples:
        if sample.category:
            found.setdefault(sample.category, []).append(sample.score)
    return {
        name: None if None in scores else fmean(score for score in scores if score is not None)
        for name, scores in found.items()
    }


def _gate(samples: Sequence[Sample]) -> dict[str, float]:
    """Specialist -> average weight over all tokens of the replies."""
    weighed = [(sample.gate, sample.tokens) for sample in samples if sample.gate and sample.tokens]
    total = sum(tokens for _, tokens in weighed)
    names = dict.fromkeys(name for gate, _ in weighed for name in gate)
    return {name: sum(gate.get(name, 0.0) * tokens for gate, tokens in weighed) / total for name in names}


def _pairs(known: Mapping[str, Mapping[str, Scores]], benchmarks: Sequence[Benchmark]) -> list[dict[str, Any]]:
    """Every two models on every benchmark that both have scores of; p adjusted within a benchmark's pairs as well."""
    found: list[dict[str, Any]] = []
    for one in benchmarks:
        parts = {model: own[one.name] for model, own in known.items() if one.name in own}
        tests = {pair: paired_test(parts[pair[0]], parts[pair[1]], _SEED) for pair in combinations(parts, 2)}
        adjusted = holm({pair: test.p for pair, test in tests.items()})
        for (first, second), test in tests.items():
            ends = {"low": test.interval.low, "high": test.interval.high}
            sure = {"p": test.p, "p_holm": adjusted[first, second], "exact": test.exact, "judged": one.judged}
            difference = {"difference": test.difference, **ends, **sure}
            found.append({"first": first, "second": second, "benchmark": one.name, **difference})
    return found


def _average_pairs(known: Mapping[str, Mapping[str, Scores]], benchmarks: Sequence[Benchmark]) -> list[dict[str, Any]]:
    """How far every two models' averages are apart, with intervals from the same items' differences."""
    found: list[dict[str, Any]] = []
    for (first, own), (second, other) in combinations(known.items(), 2):
        for title, members in average_members(benchmarks).items():
            if not all(name in own and name in other for name in members):
                continue
            parts = [less(own[name], other[name]) for name in members]
            ends = interval(parts, _SEED, -1.0)
            judged = any(one.judged for one in benchmarks if one.name in members)
            difference = {"difference": fmean(p.mean for p in parts), "low": ends.low, "high": ends.high}
            found.append({"first": first, "second": second, "average": title, **difference, "judged": judged})
    return found


def _known(
    by_place: Mapping[str, Mapping[str, list[Sample]]], benchmarks: Sequence[Benchmark]
) -> dict[str, dict[str, Scores]]:
    """Model -> benchmark -> scores, where all are there."""
    return {
        model: {
            one.name: _scores(own[one.name])
            for one in benchmarks
            if one.name in own and all(sample.score is not None for sample in own[one.name])
        }
        for model, own in by_place.items()
    }
