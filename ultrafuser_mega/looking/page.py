"""The page: counts, lengths, what was removed, topics and samples, in one file that loads nothing from anywhere.

Data may hold anything, "</script>" included: what Python writes is escaped, what the script shows is set as text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ultrafuser_mega.cleaning.rules import RULES
from ultrafuser_mega.looking.gather import BINS, Gathered, OfClass
from ultrafuser_mega.looking.places import Seen
from ultrafuser_mega.reporting.palette import specialist_colors

_LONGEST = 6000  # characters of a text that is shown
_WIDE, _HIGH, _FOOT = 420, 110, 16  # of a histogram, in its own units
_MARKS = (1, 10, 100, 1000)
Colors = Mapping[str, str]  # class -> "r g b"


def page(
    title: str,
    gathered: Gathered,
    report: Mapping[str, Any] | None = None,
    left_out: Mapping[tuple[str, str, str], int] | None = None,
    picture: tuple[bytes, str] | None = None,
) -> str:
    """The page's HTML.

    Args:
        title: over all.
        gathered: rows.
        report: of a cleaning, as its report.json has it; None: there was none.
        left_out: of a synthesis; None: there was none.
        picture: a PNG of where rows lie to each other, and what it shows.
    """
    colors = {name: _rgb(color) for name, color in specialist_colors(list(gathered.classes)).items()}
    parts = [_head(title, gathered), _classes(gathered, colors), _lengths(gathered, colors)]
    parts += [_removed(report), _benchmarks(report)] if report is not None else []
    parts += [_left_out(left_out)] if left_out else []
    if picture is not None:
        png, told = picture
        image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(told)}">'
        parts.append(f"<h2>Where they lie</h2><p>{escape(told)}</p>{image}")
    template = files("ultrafuser_mega.looking").joinpath("page.html").read_text(encoding="utf-8")
    before, _, rest = template.partition("__CONTENT__")
    between, _, after = rest.partition("__DATA__")
    data = {"colors": colors, "tree": _tree(gathered), "samples": [_sample(one) for one in gathered.samples]}
    # Within a script element only "<" means anything to HTML.
    return "".join([before, "\n".join(parts), between, json.dumps(data).replace("<", "\\u003c"), after])


def _rgb(color: str) -> str:
    return " ".join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))


def _head(title: str, gathered: Gathered) -> str:
    rows = sum(one.rows for one in gathered.classes.values())
    told = f"{rows:,} rows of {len(gathered.classes)} {'class' if len(gathered.classes) == 1 else 'classes'}"
    if gathered.malformed:
        told += f"; {gathered.malformed:,} more are no conversations"
    links = " · ".join(f'<a href="#{place}">{name}</a>' for place, name in (("topics", "Topics"), ("read", "Samples")))
    return f"<h1>{escape(title)}</h1><p>{told}. {links}</p>"


def _classes(gathered: Gathered, colors: Colors) -> str:
    deepest = max((len(topic) for one in gathered.classes.values() for topic in one.topics), default=1)
    levels = ["topics", *("sub-topics" if level == 1 else f"of level {level + 1}" for level in range(1, deepest))]
    rows = []
    for name, one in gathered.classes.items():
        counts = [len({topic[: level + 1] for topic in one.topics if len(topic) > level}) for level in range(deepest)]
        chip = f'<span class="chip" style="--rgb:{colors[name]}">{escape(name)}</span>'
        replies = sum(one.lengths["reply"])
        means = [f"{one.turns / one.rows:.2f}", f"{one.words / replies:.0f}"]
        rows.append([chip, f"{one.rows:,}", *(f"{count:,}" for count in counts), *means])
    return _table(["class", "rows", *levels, "turns", "words of a reply"], rows)


def _lengths(gathered: Gathered, colors: Colors) -> str:
    charts = [
        _histogram(name, kind, one, colors[name])
        for name, one in gathered.classes.items()
        for kind in ("question", "reply")
    ]
    return f'<h2>Lengths</h2><p>Words, on a logarithmic scale.</p><div class="charts">{"".join(charts)}</div>'


def _histogram(name: str, kind: str, one: OfClass, color: str) -> str:
    counts = one.lengths[kind]
    most, wide, high = max(*counts, 1), _WIDE / BINS, _HIGH - _FOOT
    bars = "".join(
        f'<rect x="{at * wide + 0.5:.1f}" y="{high - count / most * high:.1f}" width="{wide - 1:.1f}" '
        f'height="{count / most * high:.1f}"><title>{_span(at)}: {count:,}</title></rect>'
        for at, count in enumerate(counts)
        if count
    )
    places = [(2 * (len(bin(mark)) - 3) + 2 * (mark / 2 ** (len(bin(mark)) - 3) - 1), mark) for mark in _MARKS]
    marks = "".join(f'<text x="{at * wide:.0f}" y="{_HIGH - 3}">{mark:,}</text>' for at, mark in places)
    told = f"{name}: words of a {kind}"
    return (
        f'<figure><figcaption>{escape(told)}</figcaption><svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" '
        f'aria-label="{escape(told)}; the highest bar is {most:,}" style="--rgb:{color}">'
        f'<line x1="0" y1="{high}" x2="{_WIDE}" y2="{high}"/>{bars}{marks}</svg></figure>'
    )


def _span(at: int) -> str:
    first, last = -(-(2 ** (at / 2)) // 1), -(-(2 ** ((at + 1) / 2)) // 1) - 1
    return f"{first:.0f} words" if last <= first else f"{first:.0f} to {last:.0f} words"


def _removed(report: Mapping[str, Any]) -> str:
    names = list(report["rows"])
    body = [["read", *(f"{one['read']:,}" for one in report["rows"].values()), ""]]
    for rule in report["rules"]["asked"]:
        if rule == "language" and not report["rules"]["languages"]:
            continue
        counts = report["removed"].get(rule, {})
        body.append([escape(rule), *(f"{counts.get(name, 0):,}" for name in names), escape(RULES.get(rule, ""))])
    body.append(["kept", *(f"{one['kept']:,}" for one in report["rows"].values()), ""])
    table = _table(["rule", *map(escape, names), "what it removes"], body, text=len(names) + 1)
    examples = "".join(_examples(rule, some) for rule, some in report["examples"].items())
    return f"<h2>What was removed</h2>{table}<h3>Examples</h3>{examples or '<p>Nothing was removed.</p>'}"


def _examples(rule: str, some: Sequence[Mapping[str, str]]) -> str:
    items = "".join(
        f"<div><small>{escape(one['class'])}, {escape(one['place'])}: {escape(one['why'])}</small>"
        f'<div class="said">{escape(one["question"])}</div><div class="said">{escape(one["reply"])}</div></div>'
        for one in some
    )
    return f"<details><summary>{escape(rule)} <small>the first {len(some)}</small></summary>{items}</details>"


def _benchmarks(report: Mapping[str, Any]) -> str:
    if not report["benchmarks"]:
        return "<h2>Benchmarks</h2><p>None was looked for: ultrafuser clean --benchmarks FOLDER does.</p>"
    names = list(report["rows"])
    body = []
    for benchmark, one in report["benchmarks"].items():
        cells = []
        for name in names:
            met = one["rows"].get(name, {})
            counts = [met.get(how, 0) for how in ("copy", "any", "near")]
            cells.append(" / ".join(f"{count:,}" for count in counts) if any(counts) else "0")
        body.append([escape(benchmark), f"{one['items']:,}", f"{one['too_short']:,}", *cells])
    table = _table(["benchmark", "items", "too short", *map(escape, names)], body)
    found: dict[tuple[str, str], list[str]] = {}
    for match in report["matches"]:
        told = f"{match['share']:.0%} of the {match['part']} of {match['id']}, {match['class']}, {match['place']}"
        line = f'<div><small>{escape(told)}</small><div class="said">{escape(match["text"])}</div></div>'
        found.setdefault((match["benchmark"], match["how"]), []).append(line)
    lists = "".join(
        f"<details><summary>{escape(benchmark)} <small>{escape(how)}: the first {len(lines)}</small></summary>"
        f"{''.join(lines)}</details>"
        for (benchmark, how), lines in found.items()
    )
    rule = report["rules"]["benchmarks"]
    told = (
        "Rows that hold an item (removed) / share any 13-gram with one / hold one but for its numbers (listed). "
        f"An item is held from {rule['share']:.0%} of its 13-grams on; rule: {rule['rule']}."
    )
    return f"<h2>Benchmarks</h2><p>{escape(told)}</p>{table}{lists}"


def _left_out(counts: Mapping[tuple[str, str, str], int]) -> str:
    body = [[*map(escape, key), f"{count:,}"] for key, count in counts.items()]
    return "<h2>Left out in the making</h2>" + _table(["class", "step", "reason", "number"], body)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    """Of cells that are HTML already; the column ``text`` holds prose."""
    head = "".join(f"<th{_kind(cell, at == text)}>{cell}</th>" for at, cell in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(cell, at == text)}>{cell}</td>" for at, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _kind(cell: str, is_text: bool) -> str:
    return ' class="text"' if is_text else ' class="none"' if cell == "0" else ""


def _tree(gathered: Gathered) -> dict[str, Any]:
    """Topics within topics; a class is the widest."""
    root: dict[str, Any] = {"name": "", "rows": 0, "topics": {}}
    for name, one in gathered.classes.items():
        for topic, count in one.topics.items():
            node = root
            node["rows"] += count
            for part in (name, *topic):
                node = node["topics"].setdefault(part, {"name": part, "rows": 0, "topics": {}})
                node["rows"] += count
    return _listed(root)


def _listed(node: Mapping[str, Any]) -> dict[str, Any]:
    return {**node, "topics": [_listed(below) for below in node["topics"].values()]}


def _sample(seen: Seen) -> dict[str, Any]:
    turns = [[_cut(user), _cut(assistant)] for user, assistant in seen.conversation.turns]
    return {"of": seen.class_name, "topic": seen.topic, "system": _cut(seen.conversation.system or ""), "turns": turns}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [.. {len(text) - _LONGEST:,} more characters]"
