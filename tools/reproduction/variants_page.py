"""adapters.md or students.md, and as JSON: what trained, what it took, what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from reproduction.measured import Measured, recovered
from reproduction.rows import AFTER_STAGE_1, ULTRAFUSER
from reproduction.verdicts import Spread
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
    return _write(out / "adapters.md", "# What stage 2 trains", facts, _RULE + told, _table(head, rows), document)


def students_page(out: Path, m: Measured, students: Sequence[str], facts: Mapping[str, Any]) -> Path:
    """Of one model out; ``students`` are the rows that learned from the fused model."""
    best, shares = best_single(m, students), {}
    head = ["model", *m.classes, MEAN, "of the way to the fused model", "to the oracle per sample"]
    singles = [row for row in m.losses if row not in (*students, ULTRAFUSER, AFTER_STAGE_1, *YARDSTICKS)]
    rows = []
    for row in [*singles, *students, AFTER_STAGE_1, ULTRAFUSER, ORACLE_PER_SAMPLE]:
        if row not in m.losses:
            continue
        cells = [Spread.of(m.losses[row][column]).words() for column in (*m.classes, MEAN)]
        shares[row] = {top: recovered(m, best, row, top) for top in (ULTRAFUSER, ORACLE_PER_SAMPLE)}
        cells += [Spread.of(own).words(2) for own in shares[row].values()] if row in students else ["", ""]
        rows.append([row, *cells])
    told = (
        f"Shares are (single - model) / (single - top), the single model being `{best}`, the best of those above it.\n"
    )
    document = {"facts": facts, "losses": m.losses, "best_single": best, "recovered": shares}
    return _write(
        out / "students.md",
        "# One model that learned from the fused one",
        facts,
        _RULE + told,
        _table(head, rows),
        document,
    )


def best_single(m: Measured, students: Sequence[str]) -> str:
    """The row with the lowest mean over seeds, of specialists, merged and further-tuned models."""
    others = (*students, ULTRAFUSER, AFTER_STAGE_1, *YARDSTICKS)
    return min((row for row in m.losses if row not in others), key=lambda row: fmean(m.losses[row][MEAN]))


def _write(
    page: Path, title: str, facts: Mapping[str, Any], told: str, table: str, document: Mapping[str, Any]
) -> Path:
    page.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    write_atomically(page, "\n".join([f"{title}\n", "".join(f"- {k}: {v}\n" for k, v in facts.items()), told, table]))
    return page


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
