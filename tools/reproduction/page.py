"""results.md and claims.json: what was claimed, what was found, and the tables behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reproduction.claims import headroom
from reproduction.measured import Measured, Table, deviations
from reproduction.rows import (
    AFTER_STAGE_1,
    AVERAGE,
    BTX,
    DIRECT_SAMPLES,
    DIRECT_SAMPLES_GATE,
    DIRECT_STEPS,
    DIRECT_STEPS_GATE,
    FUSECHAT,
    IID,
    LLAMAFUSER,
    SKEWED,
    TASK_ARITHMETIC,
    TOKENS,
    ULTRAFUSER,
    further_tuned,
    on_own_class,
)
from reproduction.verdicts import Claim, Spread, counted
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.reporting.records import MEAN, YARDSTICKS

_RULE = """Losses are held-out nats per response token; ± is half of Student's 95 % interval of the mean over seeds. A
claim holds where all differences over the seeds have its sign and their 95 % interval leaves 0 out (or the margin,
where it is "as good as"), does not hold where both are so for the opposite, and is undecided otherwise. A claim of
several comparisons needs all of them. Differences read "first - second": negative means that the first has less."""


def write_page(
    out: Path, measured: Measured, found: Sequence[Claim], facts: Mapping[str, Any], plots: list[Path]
) -> Path:
    """``out``/results.md, and claims.json with every number that decided.

    Args:
        out: the folder.
        measured: what the tables hold.
        found: the claims.
        facts: what made the results: commit, machine, options.
        plots: pictures in ``out``.
    """
    document: dict[str, Any] = {
        "facts": facts,
        "claims": [claim.as_json() for claim in found],
        "left_out": measured.left_out,
    }
    document["headroom"] = headroom(measured)
    document["losses"], document["accuracies"] = measured.losses, measured.accuracies
    (out / "claims.json").write_text(json.dumps(document, indent=1) + "\n")
    parts = ["# The paper's tables and figures on small models\n", _facts(facts), f"{_RULE}\n"]
    for title, own in (
        ("Claims of the paper", [claim for claim in found if claim.paper]),
        ("Beyond the paper", [claim for claim in found if not claim.paper]),
    ):
        parts.append(f"## {title}: {counted(own)}\n\n{_claims(own)}")
    parts += _tables(measured)
    if measured.left_out:
        lines = "".join(f"- {row}: {why}\n" for row, why in measured.left_out.items())
        parts.append(f"## Left out\n\n{lines}")
    pictures = "".join(f"\n{_title(path)}\n\n![{path.stem}]({path.relative_to(out)})\n" for path in plots)
    parts.append(f"## Figures\n{pictures}")
    page = out / "results.md"
    write_atomically(page, "\n".join(parts))
    return page


def rows_of_table_1(measured: Measured) -> list[str]:
    """In the paper's order, with the rows that a fused model is read against behind."""
    names = measured.specialists
    rows = [*names, *(further_tuned(name) for name in names), AVERAGE, TASK_ARITHMETIC, BTX, FUSECHAT, LLAMAFUSER]
    return [*rows, AFTER_STAGE_1, ULTRAFUSER, *YARDSTICKS]


def _tables(m: Measured) -> list[str]:
    shares = headroom(m)
    share = "Headroom recovered, (best further-tuned single - UltraFuser) / (that - oracle per sample): "
    strategies = [DIRECT_SAMPLES, DIRECT_SAMPLES_GATE, DIRECT_STEPS, DIRECT_STEPS_GATE, IID, SKEWED, TOKENS, ULTRAFUSER]
    own = [row for name in m.own for row in (name, further_tuned(name), on_own_class(name))]
    parts = [
        _table("Table 1: held-out loss", "model", m.classes, m.losses, rows_of_table_1(m)),
        f"{share}{Spread.of(shares).words()}\n" if shares else "",
        _table(
            "Table 1: accuracy on tasks that can be checked",
            "model",
            m.classes,
            m.accuracies,
            rows_of_table_1(m),
            100.0,
        ),
        _table("Table 2: training strategies, held-out loss", "strategy", m.classes, m.losses, strategies),
        _table("Table 3: specialists' held-out loss", "specialist", m.classes, m.losses, m.specialists),
        _table_4(m),
        _table("Table 6: gate weight per token", "weight of", m.classes, m.gate_per_token, m.specialists),
        _table("Figure 6: gate weight per sample", "weight of", m.classes, m.gate_per_sample, m.specialists),
        _table(
            "Table 8 and figure 7: held-out loss of what was trained further",
            "model",
            m.classes,
            m.losses,
            [*own, ULTRAFUSER],
        ),
        _table("Table 8: accuracy", "model", m.classes, m.accuracies, [*own, ULTRAFUSER], 100.0),
    ]
    return [part for part in parts if part]


def _table_4(m: Measured) -> str:
    rows = [row for row in (ULTRAFUSER, IID, SKEWED, TOKENS) if len(m.checkpoints.get(row, ())) == len(m.seeds)]
    if not rows:
        return ""
    lines = ["| sampling | mean over checkpoints | standard deviation over checkpoints |", "|---|---|---|"]
    for row in rows:
        means, spreads = deviations(m, row)
        sampling = "balanced" if row == ULTRAFUSER else row
        lines.append(f"| {sampling} | {Spread.of(means).words()} | {Spread.of(spreads).words(4)} |")
    return "## Table 4: the last half of stage 2's evaluations, held-out loss\n\n" + "\n".join(lines) + "\n"


def _table(
    title: str, corner: str, classes: Sequence[str], table: Table, rows: Sequence[str], scale: float = 1.0
) -> str:
    present = [row for row in rows if row in table]
    if not present:
        return ""
    columns = [c for c in (*classes, MEAN) if any(c in table[row] for row in present)]
    digits = 3 if scale == 1.0 else 1
    body = []
    for row in present:
        own = table[row]
        cells = [Spread.of([scale * value for value in own[c]]).words(digits) if c in own else "-" for c in columns]
        body.append(f"| {row} | " + " | ".join(cells) + " |")
    head = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return f"## {title}{' (%)' if scale != 1.0 else ''}\n\n" + "\n".join([*head, *body]) + "\n"


def _claims(found: Sequence[Claim]) -> str:
    lines = ["| where | claim | verdict | why |", "|---|---|---|---|"]
    lines += [f"| {c.place} | {c.words} | **{c.verdict}** | {c.why()} |" for c in found]
    return "\n".join(lines) + "\n"


def _facts(facts: Mapping[str, Any]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in facts.items())


def _title(path: Path) -> str:
    return f"### {path.stem.replace('_', ' ')}"
