"""adapters.md or students.md, and as JSON: what trained, what it took, what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from reproduction.measured import Measured, Table, recovered
from reproduction.rows import AFTER_STAGE_1, ULTRAFUSER
from reproduction.verdicts import Spread
from ultrafuser_mega.evaluation.rows import ORACLE
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.reporting.records import MEAN, ORACLE_PER_SAMPLE, YARDSTICKS, read_metrics

_RULE = "Held-out nats per response token; ± is half of Student's 95 % interval of the mean over seeds.\n"
_MIB = 2**20
_KEPT = 12  # bytes of a trained float32 parameter and its moments in a checkpoint


@dataclass(frozen=True)
class Cost:
    """What a kind of training takes of one rank.

    Attributes:
        trained: parameters.
        peak: kind of memory -> bytes when most was allocated, of a dry run of stage 2.
        seconds: of a step of one run, the median.
    """

    trained: int
    peak: Mapping[str, int]
    seconds: float = math.nan


def median_seconds(run_dir: Path) -> float:
    """Of a step."""
    steps, _ = read_metrics(run_dir)
    return median(record.seconds for record in steps)


def adapters_page(out: Path, m: Measured, costs: Mapping[str, Cost], facts: Mapping[str, Any]) -> Path:
    """Of what stage 2 trained; ``costs`` by row."""
    head = ["stage 2 trained", *m.classes, MEAN, "trained", "states MiB", "peak MiB", "kept MiB", "s a step"]
    rows = []
    for row in [*m.specialists, AFTER_STAGE_1, *costs]:
        if row not in m.losses:
            continue
        cells = [Spread.of(m.losses[row][column]).words() for column in (*m.classes, MEAN)]
        if (cost := costs.get(row)) is None:
            cells += [""] * 5
        else:
            states = sum(cost.peak.get(kind, 0) for kind in ("gradients", "optimizer"))
            sizes = (states, sum(cost.peak.values()), _KEPT * cost.trained)
            cells += [f"{cost.trained:,}", *(f"{size / _MIB:.1f}" for size in sizes), f"{cost.seconds:.2f}"]
        rows.append([row, *cells])
    told = "States are gradients and optimizer; states and peak are of a dry run on samples of the greatest length.\n"
    told += "Kept is what a checkpoint holds of what trains, all that it holds with checkpoint.weights=trained.\n"
    document = {"facts": facts, "losses": m.losses, "costs": {row: asdict(cost) for row, cost in costs.items()}}
    text = f"{_RULE}{told}\n{_table(head, rows)}"
    return _write(out / "adapters.md", "# What stage 2 trains", facts, text, document)


def students_page(
    out: Path, m: Measured, students: Sequence[str], labels: Sequence[str], facts: Mapping[str, Any]
) -> Path:
    """Of one model out; ``students`` are the rows that learned from the fused model, ``labels`` those from labels."""
    best, oracle = best_single(m, students), ORACLE.format(", ".join(m.specialists))
    singles = [row for row in m.losses if row not in (*students, ULTRAFUSER, AFTER_STAGE_1, *YARDSTICKS)]
    rows = [*singles, *students, AFTER_STAGE_1, ULTRAFUSER]
    recovered_losses = _recovered(m.losses, best, students, (ULTRAFUSER, ORACLE_PER_SAMPLE))
    document: dict[str, Any] = {"facts": facts, "losses": m.losses, "best_single": best, "recovered": recovered_losses}
    ways = {ULTRAFUSER: "of the way to the fused model", ORACLE_PER_SAMPLE: "to the oracle per sample"}
    told = (
        f"Shares are (single - model) / (single - top), the single model being `{best}`, the best of those above it.\n"
    )
    text = f"{_RULE}{told}\n{_students_table(m, m.losses, [*rows, ORACLE_PER_SAMPLE], recovered_losses, ways)}"
    if m.accuracies:
        asked = [row for row in labels if row in m.accuracies]
        single = max(asked, key=lambda row: fmean(m.accuracies[row][MEAN]), default=None)
        shares = {} if single is None else _recovered(m.accuracies, single, [*students, ULTRAFUSER], (oracle,))
        document |= {"accuracies": m.accuracies, "single_of_accuracies": single, "recovered_accuracy": shares}
        told = "Right replies to generated tasks, in %, greedy; the oracle has an item right that any specialist has.\n"
        if single is not None:
            told += (
                f"The share is that of `ultrafuser evaluate --single '{single}' --oracle {','.join(m.specialists)}`: "
                "(model - single) / (oracle - single), of the row of labels alone with most right replies.\n"
            )
        table = _students_table(m, m.accuracies, [*rows, oracle], shares, {oracle: "of the headroom"}, 100.0)
        text += f"\n## Accuracy\n\n{told}\n{table}"
    return _write(out / "students.md", "# One model that learned from the fused one", facts, text, document)


def _students_table(
    m: Measured,
    table: Table,
    rows: Sequence[str],
    shares: Mapping[str, Mapping[str, list[float]]],
    ways: Mapping[str, str],
    scale: float = 1.0,
) -> str:
    """Of ``rows`` that were measured; ``ways``: where a share ends -> its column."""
    classes = [name for name in m.classes if any(name in own for own in table.values())]
    digits, lines = 3 if scale == 1.0 else 1, []
    for row in rows:
        if row not in table:
            continue
        cells = [Spread.of([scale * v for v in table[row][column]]).words(digits) for column in (*classes, MEAN)]
        own = shares.get(row, {})
        lines.append([row, *cells, *(Spread.of(own[top]).words(2) if top in own else "" for top in ways)])
    return _table(["model", *classes, MEAN, *ways.values()], lines)


def _recovered(
    table: Table, single: str, rows: Sequence[str], tops: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Row -> where it goes -> shares by seed, of ways that go the same direction in all seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for top in tops:
        if top not in table:
            continue
        way = [end - begin for begin, end in zip(table[single][MEAN], table[top][MEAN], strict=True)]
        if min(way) > 0 or max(way) < 0:
            for row in rows:
                if row in table and row != top:
                    found.setdefault(row, {})[top] = recovered(table, single, row, top)
    return found


def best_single(m: Measured, students: Sequence[str]) -> str:
    """The row with the lowest mean over seeds, of specialists, merged and further-tuned models."""
    others = (*students, ULTRAFUSER, AFTER_STAGE_1, *YARDSTICKS)
    return min((row for row in m.losses if row not in others), key=lambda row: fmean(m.losses[row][MEAN]))


def _write(page: Path, title: str, facts: Mapping[str, Any], text: str, document: Mapping[str, Any]) -> Path:
    page.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    write_atomically(page, "\n".join([f"{title}\n", "".join(f"- {k}: {v}\n" for k, v in facts.items()), text]))
    return page


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
