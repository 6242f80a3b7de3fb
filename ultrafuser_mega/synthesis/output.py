"""What a run leaves: rows as JSON lines and as Parquet, what was left out, statistics, and a card.

Nothing in these files depends on when or how often the run was started: no times, no counts of attempts that a ledger
does not hold. Each gets its name once it is whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from ultrafuser_mega.files import drop_drafts, whole, write_atomically
from ultrafuser_mega.reporting.markdown import as_text, markdown_table
from ultrafuser_mega.synthesis.config import SynthesisConfig
from ultrafuser_mega.synthesis.ledger import Ledger
from ultrafuser_mega.synthesis.left_out import LeftOut
from ultrafuser_mega.synthesis.requests import GOOD
from ultrafuser_mega.synthesis.responses import Conversation
from ultrafuser_mega.synthesis.rows import row_of
from ultrafuser_mega.synthesis.topics import Topic, write_topics

DATA, PARQUET, TOPICS, LEFT_OUT, CARD, STATISTICS = (
    "data",
    "parquet",
    "topics",
    "left_out.jsonl",
    "README.md",
    "statistics.json",
)
_EXAMPLES = 3  # of topics, in the table
_PARQUET_ROWS = 10_000  # of a row group


@dataclass(frozen=True)
class Made:
    """All of one class."""

    topics: list[Topic]
    conversations: list[Conversation]


def write_output(
    folder: Path, config: SynthesisConfig, ledger: Ledger, made: Mapping[str, Made], left_out: LeftOut
) -> list[Path]:
    """Write it; returns the files with rows, one for each class. The folder is this process's alone."""
    drop_drafts(folder)
    for name in (DATA, TOPICS):
        (folder / name).mkdir(exist_ok=True)
    written, statistics = [], {}
    for of, one in made.items():
        write_atomically(folder / TOPICS / f"{of}.yaml", write_topics(one.topics))
        path = folder / DATA / f"{of}.jsonl"
        counting = _Counting(one)
        with whole(path) as draft, draft.open("w", encoding="utf-8") as file:
            for conversation in one.conversations:
                row = row_of(config, ledger, of, conversation)
                counting.row(row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        statistics[of] = counting.found()
        written.append(path)
        if find_spec("pyarrow") is not None:
            _write_parquet(path, folder / PARQUET / f"{of}.parquet")
    write_atomically(folder / LEFT_OUT, left_out.jsonl())
    took = _took(ledger)
    counts = [[*key, count] for key, count in left_out.counts().items()]
    whole_set = {"classes": statistics, "left_out": counts, "replies": took}
    write_atomically(folder / STATISTICS, json.dumps(whole_set, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / CARD, card(config, statistics, left_out, took))
    return written


def card(
    config: SynthesisConfig,
    statistics: Mapping[str, Mapping[str, Any]],
    left_out: LeftOut,
    took: Sequence[Mapping[str, Any]],
) -> str:
    """The data set's README.md, with the table of UltraFuser's appendix (table 12)."""
    models = {config.models[config.step(of, step).model].model for of in statistics for step in config.used(of)}
    by = ", ".join(map(as_text, sorted(models)))
    lines = ["---", "task_categories: [text-generation]", "tags: [synthetic, instruction-tuning]", "configs:"]
    for of in statistics:
        lines += [f"- config_name: {of}", f"  data_files: {DATA}/{of}.jsonl"]
    lines += ["---", "", f"# {config.name}", ""]
    lines += [
        f"Instruction data of {len(statistics)} {'class' if len(statistics) == 1 else 'classes'}, made by "
        f"{by} along the steps of UltraFuser's section 2.2: topics, sub-topics, instructions, related "
        "instructions, a share made more complex, responses. The terms of those who provide these models apply.",
        "",
    ]
    header = ["class", "samples", "topics", "examples"]
    rows = [
        [of, f"{one['rows']:,}", " / ".join(f"{count:,}" for count in one["topics"]), as_text(one["examples"])]
        for of, one in statistics.items()
    ]
    lines.append(markdown_table(header, rows))
    header = ["class", *_ORIGINS, "made more complex", "turns", "words of instruction", "of response"]
    rows = [
        [
            of,
            *(f"{one['origins'].get(origin, 0):,}" for origin in _ORIGINS),
            *(
                f"{one['complicated']:,}",
                f"{one['turns']:.2f}",
                f"{one['words_said']:.0f}",
                f"{one['words_replied']:.0f}",
            ),
        ]
        for of, one in statistics.items()
    ]
    lines.append(markdown_table(header, rows))
    if left_out.counts():
        rows = [[*key, f"{count:,}"] for key, count in left_out.counts().items()]
        lines += [f"Left out ({LEFT_OUT} has each with its reason):", ""]
        lines.append(markdown_table(["class", "step", "reason", "number"], rows))
    priced = any(row["cost"] for row in took)
    header = ["class", "step", "replies", "of them unusable", "tokens read", "written"]
    header += [config.currency] if priced else []
    rows = [
        [row["class"] or "-", row["step"], *(f"{row[name]:,}" for name in _COUNTED)]
        + ([f"{row['cost']:.4f}"] if priced else [])
        for row in took
    ]
    lines += ["What was asked:", "", markdown_table(header, rows)]
    lines += [
        "Every row has `messages` and `provenance`: topic path, origin, the instruction before it was made more "
        "complex, the model as asked and as served, and the keys of the replies in `ledger.sqlite`.",
        "",
    ]
    return "\n".join(lines)


_COUNTED = ("replies", "unusable", "read", "written")
_ORIGINS = ("first", "strongly related", "weakly related", "by hand")


class _Counting:
    """Statistics of rows that pass by."""

    def __init__(self, made: Made) -> None:
        self._topics = made.topics
        self._origins: Counter[str] = Counter()
        self._complicated = self._rows = 0
        self._turns: list[int] = []
        self._said: list[int] = []
        self._replied: list[int] = []

    def row(self, row: Mapping[str, Any]) -> None:
        self._rows += 1
        self._origins[row["provenance"]["origin"]] += 1
        self._complicated += row["provenance"]["complicated"]
        said = [message["content"] for message in row["messages"] if message["role"] == "user"]
        replied = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        self._turns.append(len(said))
        self._said.append(len(said[0].split()))
        self._replied += [len(text.split()) for text in replied]

    def found(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "topics": _levels(self._topics),
            "examples": _examples(self._topics),
            "origins": dict(sorted(self._origins.items())),
            "complicated": self._complicated,
            "turns": fmean(self._turns) if self._turns else 0.0,
            "words_said": fmean(self._said) if self._said else 0.0,
            "words_replied": fmean(self._replied) if self._replied else 0.0,
        }


def _levels(topics: Sequence[Topic]) -> list[int]:
    counts, level = [], list(topics)
    while level:
        counts.append(len(level))
        level = [below for topic in level for below in topic.topics]
    return counts


def _examples(topics: Sequence[Topic]) -> str:
    some = []
    for topic in topics[:_EXAMPLES]:
        below = ", ".join(one.name for one in topic.topics[:_EXAMPLES])
        some.append(f"{topic.name} {{{below}}}" if below else topic.name)
    return ", ".join(some)


def _took(ledger: Ledger) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for total in ledger.totals():
        start = {"replies": 0, "unusable": 0, "read": 0, "written": 0, "cost": 0.0}
        row = found.setdefault((total.of, total.step), {"class": total.of, "step": total.step, **start})
        row["replies"] += total.replies
        row["unusable"] += total.replies if total.verdict != GOOD else 0
        row["read"] += total.read
        row["written"] += total.written
        row["cost"] = round(row["cost"] + total.cost, 9)
    return list(found.values())


def _write_parquet(source: Path, path: Path) -> None:
    """The rows of a file of JSON lines, for ``datasets``; columns are those of the rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    keys = pa.struct([(name, pa.list_(pa.string())) for name in ("instruction", "responses", "user")])
    texts = ("class", "id", "origin", "parent", "simpler", "model", "served")
    fields = [(name, pa.string()) for name in texts]
    provenance = pa.struct([*fields, ("topic", pa.list_(pa.string())), ("complicated", pa.bool_()), ("ledger", keys)])
    schema = pa.schema([("messages", pa.list_(message)), ("provenance", provenance)])
    path.parent.mkdir(exist_ok=True)
    with whole(path) as draft, pq.ParquetWriter(draft, schema) as writer, source.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = []
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == _PARQUET_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
