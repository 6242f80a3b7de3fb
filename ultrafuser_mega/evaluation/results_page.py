"""results.json as a page for people: results.md with its plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrafuser_mega.errors import writing
from ultrafuser_mega.reporting.evaluation_plots import plot_bars, plot_lines, plot_radar

PAGE_FILE = "results.md"
_JUDGED = "\u2020"
_GAP = "-"
_ALL_PAIRS = 4  # models, up to which every pair has its row


def write_page(out: Path, found: Mapping[str, Any]) -> Path:
    """``out/results.md`` and ``out/plots/*.png`` from what results.json holds."""
    path = out / PAGE_FILE
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        plots = _plots(out / "plots", found)
        path.write_text(page(found, [plot.relative_to(out) for plot in plots]))
    return path


def page(found: Mapping[str, Any], plots: Sequence[Path] = ()) -> str:
    """The Markdown."""
    parts = ["# Evaluation", scores_table(found), *_notes(found)]
    for name, one in found["benchmarks"].items():
        parts += _categories(found, name, one)
    parts += [*_pairs(found), *_headroom(found), *_behind(found), *_gate(found)]
    parts += [f"![{plot.stem}]({plot.as_posix()})" for plot in plots]
    parts.append("Settings, versions and digests of the data are in `results.json`, every reply in `samples.jsonl`.")
    return "\n\n".join(parts) + "\n"


def scores_table(found: Mapping[str, Any]) -> str:
    """Rows are models, columns benchmarks as in UltraFuser's table 1, then averages; the best of a column is bold."""
    columns = {name: one for name, one in found["benchmarks"].items() if one["scale"] == 100.0}
    titles = list(dict.fromkeys(title for own in found["models"].values() for title in own["averages"]))
    titles = [title for title in titles if title != "all"] + [title for title in titles if title == "all"]
    head = [f"{one['title']} {one['metric']}{_mark(one['judged'])}" for one in columns.values()]
    judged = {
        title: any(own["averages"].get(title, {}).get("judged") for own in found["models"].values()) for title in titles
    }
    head += [f"Avg. {title}{_mark(judged[title])}" for title in titles]
    rows = {
        model: [own["scores"].get(name) for name in columns] + [own["averages"].get(title) for title in titles]
        for model, own in found["models"].items()
    }
    return _table(["Model", *head], _marked(rows, lambda cell: cell["mean"], _score))


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [
        "Per cent, with 95 % intervals: BCa bootstrap over groups of items that depend on each other "
        "(one TruthfulQA question with all its options). An average counts every benchmark once."
    ]
    if any(one["judged"] for one in found["benchmarks"].values()):
        judge = found["settings"].get("judge")
        by = f" ({judge})" if isinstance(judge, str) else ""
        notes.append(f"{_JUDGED} scored by a judge{by}, or an average that holds such scores.")
    notes += [f"{line}." for line in found["not_asked"]]
    notes += [f"{count} items of {name} are left out: no verdict." for name, count in found["no_verdict"].items()]
    for model, own in found["models"].items():
        waiting = {name: cell["unjudged"] for name, cell in own["scores"].items() if cell["unjudged"]}
        notes += [f"{model}: {count} replies of {name} wait for a judge." for name, count in waiting.items()]
    return notes


def _categories(found: Mapping[str, Any], name: str, one: Mapping[str, Any]) -> list[str]:
    rows = {
        model: {**own["categories"][name], "Overall": own["scores"][name]["mean"]}
        for model, own in found["models"].items()
        if name in own["categories"]
    }
    if not rows:
        return []
    columns = list(dict.fromkeys(category for row in rows.values() for category in row if category != "Overall"))
    columns.append("Overall")
    cells = {model: [row.get(category) for category in columns] for model, row in rows.items()}
    shown = _marked(cells, lambda value: value, lambda value: f"{value * one['scale']:.2f}")
    head = ["Model", *(category.capitalize() for category in columns)]
    return [f"## {one['title']}{_mark(one['judged'])}", _table(head, shown)]


def _pairs(found: Mapping[str, Any]) -> list[str]:
    models = list(found["models"])
    every = len(models) <= _ALL_PAIRS
    pairs, averages = (
        [pair for pair in found[kind] if every or models[0] in (pair["first"], pair["second"])]
        for kind in ("pairs", "average_pairs")
    )
    if not pairs:
        return []
    columns = {name: one for name, one in found["benchmarks"].items() if any(p["benchmark"] == name for p in pairs)}
    titles = {pair["average"]: f"Avg. {pair['average']}{_mark(pair['judged'])}" for pair in averages}
    rows: dict[str, dict[tuple[str, str], str]] = {}  # a benchmark may be called as an average is
    for pair in pairs:
        scale = columns[pair["benchmark"]]["scale"]
        sure = "\\*" if pair["p_holm"] < 0.05 else ""
        text = f"{pair['difference'] * scale:+.{1 if scale == 100.0 else 2}f} (p {_p(pair['p'])}){sure}"
        rows.setdefault(f"{pair['first']} - {pair['second']}", {})["benchmark", pair["benchmark"]] = text
    for pair in averages:
        difference, low, high = (f"{100 * pair[name]:+.1f}" for name in ("difference", "low", "high"))
        rows[f"{pair['first']} - {pair['second']}"]["average", pair["average"]] = f"{difference} ({low}, {high})"
    head = ["Pair", *(f"{one['title']}{_mark(one['judged'])}" for one in columns.values()), *titles.values()]
    keys = [*(("benchmark", name) for name in columns), *(("average", title) for title in titles)]
    shown = {pair: [row.get(key, _GAP) for key in keys] for pair, row in rows.items()}
    return [
        "## Differences on the same items",
        _table(head, shown),
        "First less second; p by sign flips of groups' differences (for right and wrong answers McNemar's exact test), "
        "two-sided; \\* below 0.05 after Holm's adjustment for all pairs of the benchmark. Averages: 95 % intervals.",
    ]


def _headroom(found: Mapping[str, Any]) -> list[str]:
    if (of := found.get("headroom")) is None:
        return []
    rows = {}
    for model, own in of["models"].items():
        share = _GAP if own["share"] is None else f"{own['share']:.0%}"
        rows[model] = [share, _GAP if own["low"] is None else f"{own['low']:.0%} to {own['high']:.0%}"]
    return [
        "## Headroom recovered",
        _table(["Model", "share", "95 % interval"], rows),
        f"(model - {of['single']}) / ({of['oracle']} - {of['single']}), of the averages over {of['average']}. A gap: "
        "the items do not show that there is any headroom.",
    ]


def _behind(found: Mapping[str, Any]) -> list[str]:
    columns = found["benchmarks"]
    rows = {model: [own["scores"].get(name) for name in columns] for model, own in found["models"].items()}
    shown = {
        model: [
            _GAP if cell is None else f"{cell['no_answer']:.0%}, {cell['cut']:.0%}, {cell['tokens']:.0f}"
            for cell in row
        ]
        for model, row in rows.items()
    }
    head = ["Model", *(f"{one['title']}, {_items(found, name)} items" for name, one in columns.items())]
    return [
        "## Behind the scores",
        _table(head, shown),
        "Replies in which no answer was found; replies cut at the limit of new tokens; tokens per item.",
    ]


def _gate(found: Mapping[str, Any]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for model, own in found["models"].items():
        for specialist in dict.fromkeys(name for weights in own["gate"].values() for name in weights):
            weights = [own["gate"].get(name, {}).get(specialist) for name in found["benchmarks"]]
            rows[f"{model}: w_{specialist}"] = [_GAP if weight is None else f"{weight:.3f}" for weight in weights]
    if not rows:
        return []
    head = ["Weight per token", *(one["title"] for one in found["benchmarks"].values())]
    return ["## Gate weights", _table(head, rows)]


def _plots(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    columns = {name: one for name, one in found["benchmarks"].items() if one["scale"] == 100.0}
    by_benchmark = {
        model: {
            one["title"] + _mark(one["judged"]): _percent(own["scores"][name])
            for name, one in columns.items()
            if _known(own, name)
        }
        for model, own in found["models"].items()
    }
    domains = list(dict.fromkeys(one["domain"] for one in columns.values()))
    by_domain = {
        model: {
            domain + _mark(cell["judged"]): _percent(cell)
            for domain in domains
            if (cell := own["averages"].get(domain)) is not None
        }
        for model, own in found["models"].items()
    }
    panels = {"By domain": by_domain, "By benchmark": by_benchmark}
    drawn = []
    if any(by_benchmark.values()):
        drawn.append(plot_bars(folder / "scores.png", by_benchmark))
        drawn.append(plot_lines(folder / "lines.png", {title: p for title, p in panels.items() if any(p.values())}))
    round_ones = {title: p for title, p in panels.items() if len({name for own in p.values() for name in own}) >= 3}
    if round_ones:
        drawn.append(plot_radar(folder / "radar.png", round_ones))
    return drawn


def _known(own: Mapping[str, Any], name: str) -> bool:
    return name in own["scores"] and own["scores"][name]["mean"] is not None


def _percent(cell: Mapping[str, Any]) -> tuple[float, float, float]:
    return 100 * cell["mean"], 100 * cell["low"], 100 * cell["high"]


def _score(cell: Mapping[str, Any]) -> str:
    mean, low, high = _percent(cell)
    return f"{mean:.2f} ({low:.1f}, {high:.1f})"


def _marked(
    rows: Mapping[str, Sequence[Any]], value: Callable[[Any], float | None], text: Callable[[Any], str]
) -> dict[str, list[str]]:
    """Rows as texts, the highest of every column bold where models differ."""
    known = {model: [None if cell is None else value(cell) for cell in row] for model, row in rows.items()}
    best = [_best([x for x in column if x is not None]) for column in zip(*known.values(), strict=True)]
    shown = {}
    for model, row in rows.items():
        texts = [_GAP if x is None else text(cell) for cell, x in zip(row, known[model], strict=True)]
        shown[model] = [
            f"**{cell}**" if x is not None and top is not None and math.isclose(x, top) else cell
            for cell, x, top in zip(texts, known[model], best, strict=True)
        ]
    return shown


def _best(values: Sequence[float]) -> float | None:
    return max(values) if values and max(values) > min(values) else None


def _table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join([name.replace("|", "\\|"), *cells]) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def _items(found: Mapping[str, Any], name: str) -> int:
    return max((own["scores"][name]["items"] for own in found["models"].values() if name in own["scores"]), default=0)


def _mark(judged: bool) -> str:
    return _JUDGED if judged else ""


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
