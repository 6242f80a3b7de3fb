"""The paper's claims, each as comparisons of what was measured. Losses: less is better. Rules: ``verdicts``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from reproduction.measured import Measured, Table, deviations, recovered
from reproduction.rows import (
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
from reproduction.verdicts import Claim, Comparison, below
from ultrafuser_mega.reporting.records import (
    MEAN,
    ORACLE_PER_CLASS,
    ORACLE_PER_SAMPLE,
    UNIFORM_LOGITS,
    UNIFORM_PROBABILITIES,
)

AS_GOOD = 0.02  # nats: what still counts as equal, "on par"
SIMILAR = 0.05  # share of the lower loss by which two curves' ends may differ and be "similar"
_TABLE_1 = (AVERAGE, TASK_ARITHMETIC, BTX, FUSECHAT)
_BEST_OF_PUBLISHED = 0.83  # share of the headroom recovered by one model


def claims(measured: Measured) -> list[Claim]:
    """All of them, in the paper's order; then what is asked beyond."""
    return [
        one
        for part in (_table_1, _table_2, _table_3, _table_4, _gate, _tuning, _curves, _beyond)
        for one in part(measured)
    ]


def headroom(measured: Measured) -> list[float]:
    """Per seed: (best further-tuned single - model) / (best further-tuned single - oracle per sample), in mean losses.

    The best single is chosen by its mean over the seeds, so that it is one model; empty where the rows are not there.
    """
    losses = measured.losses
    tuned = [row for name in measured.specialists if (row := further_tuned(name)) in losses]
    if not tuned or not {ULTRAFUSER, ORACLE_PER_SAMPLE} <= losses.keys():
        return []
    best = min(tuned, key=lambda row: fmean(losses[row][MEAN]))
    return recovered(losses, best, ULTRAFUSER, ORACLE_PER_SAMPLE)


def _table_1(m: Measured) -> list[Claim]:
    singles = [*m.specialists, *(further_tuned(name) for name in m.specialists)]
    rows = [*singles, *_TABLE_1]
    found = [
        _claim(m.losses, "table 1", f"UltraFuser has the lowest mean loss of the rows of table 1 ({kind})", parts)
        for kind, parts in (
            ("specialists and further-tuned ones", _against(m.losses, singles)),
            ("merges, BTX, FuseChat", _against(m.losses, _TABLE_1)),
        )
    ]
    found.append(
        _claim(
            m.accuracies,
            "table 1",
            "UltraFuser has the highest mean accuracy of the rows of table 1",
            [(_words(row, ULTRAFUSER), row, ULTRAFUSER, MEAN, 0.0) for row in rows],
        )
    )
    found.append(
        _claim(
            m.losses,
            "table 1",
            f"UltraFuser is on a par with each class's specialist or better (loss, margin {AS_GOOD} nats)",
            [(f"{name} data: UltraFuser - {name}", ULTRAFUSER, name, name, AS_GOOD) for name in m.own],
        )
    )
    found.append(
        _claim(
            m.losses,
            "table 1",
            "averaged weights are worse than the best further-tuned single",
            [(_words(further_tuned(name), AVERAGE), further_tuned(name), AVERAGE, MEAN, 0.0) for name in _best(m)],
        )
    )
    found.append(
        _claim(
            m.losses,
            "table 1",
            "task arithmetic at scale 1 is worse than every specialist alone",
            [(_words(name, TASK_ARITHMETIC), name, TASK_ARITHMETIC, MEAN, 0.0) for name in m.specialists],
        )
    )
    return found


def _table_2(m: Measured) -> list[Claim]:
    words = "two-stage training is better than direct training"
    cases = (
        ("one rate for everything, equal samples", DIRECT_SAMPLES),
        ("one rate for everything, equal stage-2 steps", DIRECT_STEPS),
        ("the gate at stage 1's rate in direct training as well, equal samples", DIRECT_SAMPLES_GATE),
        ("the gate at stage 1's rate in direct training as well, equal stage-2 steps", DIRECT_STEPS_GATE),
    )
    found = [_claim(m.losses, "table 2", f"{words}: {how}", _against(m.losses, [row])) for how, row in cases]
    what = "balanced batches are better than drawing all rows alike (two stages both)"
    return [*found, _claim(m.losses, "table 2", what, _against(m.losses, [IID]))]


def _table_3(m: Measured) -> list[Claim]:
    return [
        _claim(
            m.losses,
            "table 3",
            "every specialist has the lowest loss on its own class",
            [
                (f"{name} data: {name} - {other}", name, other, name, 0.0)
                for name in m.own
                for other in m.specialists
                if other != name
            ],
        )
    ]


def _table_4(m: Measured) -> list[Claim]:
    if ULTRAFUSER not in m.checkpoints:
        return []
    means, spreads = deviations(m, ULTRAFUSER)
    found = []
    for row, how in ((IID, "rows drawn alike"), (SKEWED, "skewed draws 10:1:1"), (TOKENS, "balanced tokens")):
        if len(m.checkpoints.get(row, ())) != len(m.seeds):
            continue
        other_means, other_spreads = deviations(m, row)
        claimed = row != TOKENS
        found += [
            Claim(
                "table 4",
                f"over checkpoints of stage 2, balanced samples have a lower mean loss than {how}",
                (below(f"balanced - {row}", means, other_means),),
                paper=claimed,
            ),
            Claim(
                "table 4",
                f"over checkpoints of stage 2, balanced samples have a lower standard deviation than {how}",
                (below(f"balanced - {row}", spreads, other_spreads),),
                paper=claimed,
            ),
        ]
    return found


def _gate(m: Measured) -> list[Claim]:
    found = []
    for place, table in (("table 6", m.gate_per_token), ("figure 6", m.gate_per_sample)):
        parts = [
            (f"{name} data: w_{other} - w_{name}", other, name, name, 0.0)
            for name in m.own
            for other in m.specialists
            if other != name
        ]
        unit = "token" if place == "table 6" else "sample"
        found.append(_claim(table, place, f"each class's own specialist has the largest weight per {unit}", parts))
    if {"text", "code", "math"} <= set(m.own):
        words = "on math data the code specialist has more weight than the text specialist"
        part = ("math data: w_text - w_code", "text", "code", "math", 0.0)
        found.append(_claim(m.gate_per_token, "figures 8, 9", words, [part]))
        words = "the own specialist's share is larger on code data than on text and math data"
        weights = m.gate_per_token
        parts_ = [
            below(f"w_{name} on {name} data - w_code on code data", weights[name][name], weights["code"]["code"])
            for name in ("text", "math")
            if {name, "code"} <= weights.keys()
        ]
        found.append(Claim("table 6", words, tuple(parts_), "" if parts_ else "no gate weights"))
    return found


def _tuning(m: Measured) -> list[Claim]:
    harm = [(f"{name} data: {name} - {further_tuned(name)}", name, further_tuned(name), name, 0.0) for name in m.own]
    boost = [
        (f"{of_class} data: {further_tuned(name)} - {name}", further_tuned(name), name, of_class, 0.0)
        for name in m.specialists
        for of_class in m.classes
        if of_class != name
    ]
    own = [(f"{name} data: {on_own_class(name)} - {name}", on_own_class(name), name, name, 0.0) for name in m.own]
    kept = [
        (f"{name} data: UltraFuser - {on_own_class(name)}", ULTRAFUSER, on_own_class(name), name, 0.0) for name in m.own
    ]
    everywhere = [
        (f"{of_class} data: UltraFuser - {further_tuned(name)}", ULTRAFUSER, further_tuned(name), of_class, 0.0)
        for name in m.specialists
        for of_class in m.classes
    ]
    table = m.losses
    return [
        _claim(table, "figure 7", "further tuning on all data harms a specialist's own class", harm),
        _claim(table, "figure 7", "further tuning on all data helps in the other classes", boost),
        _claim(table, "figure 7", "no further-tuned specialist is better than UltraFuser on any class", everywhere),
        _claim(table, "table 8", "further tuning on the own class helps there", own),
        _claim(table, "table 8", "UltraFuser is better on a class than its specialist tuned on that class", kept),
    ]


def _curves(m: Measured) -> list[Claim]:
    ours = m.curves.get(ULTRAFUSER, [])
    found = []

    def whole(curve: Sequence[tuple[int, float]]) -> float:
        return _over(curve, 0.0, 1.0)

    def early(curve: Sequence[tuple[int, float]]) -> float:
        return _over(curve, 0.0, 0.25)

    def end(curve: Sequence[tuple[int, float]]) -> float:
        return _over(curve, 0.9, 1.0)

    def compare(row: str, words: str, part: Callable[[Sequence[tuple[int, float]]], float]) -> None:
        theirs = m.curves.get(row, [])
        enough = len(theirs) == len(ours) == len(m.seeds)
        parts = (below(f"UltraFuser - {row}", [*map(part, ours)], [*map(part, theirs)]),) if enough else ()
        found.append(Claim("figure 5", words, parts, "" if enough else _why(m, row)))

    compare(BTX, "UltraFuser's training loss is below BTX's over the first quarter of the samples", early)
    compare(BTX, "UltraFuser's training loss is below BTX's over the last tenth of the samples", end)
    compare(LLAMAFUSER, "UltraFuser's training loss is below LlamaFuser's, over all samples", whole)
    theirs = m.curves.get(LLAMAFUSER, [])
    enough = len(theirs) == len(ours) == len(m.seeds)
    apart = [abs(end(a) - end(b)) / min(end(a), end(b)) for a, b in zip(ours, theirs, strict=False)]
    parts = (Comparison("relative distance", tuple(apart), SIMILAR),) if enough else ()
    words = f"LlamaFuser's training loss ends at a similar level (within {SIMILAR:.0%} over the last tenth)"
    return [*found, Claim("figure 5", words, parts, "" if enough else _why(m, LLAMAFUSER))]


def _beyond(m: Measured) -> list[Claim]:
    mixes = [UNIFORM_LOGITS, UNIFORM_PROBABILITIES]
    found = [
        _claim(m.losses, "beyond", f"UltraFuser is better than {what}", _against(m.losses, rows), paper=False)
        for what, rows in (
            ("the specialists' plain mean", mixes),
            ("a router that knows the class (oracle per class)", [ORACLE_PER_CLASS]),
            ("one that knows the best specialist of each sample (oracle per sample)", [ORACLE_PER_SAMPLE]),
        )
    ]
    shares = headroom(m)
    words = f"UltraFuser recovers more of the headroom than {_BEST_OF_PUBLISHED:.0%}, the best published for one model"
    parts = (below("0.83 - share", [_BEST_OF_PUBLISHED] * len(shares), shares),) if shares else ()
    return [*found, Claim("beyond", words, parts, "" if shares else "rows are missing", paper=False)]


Part = tuple[str, str, str, str, float]  # words, row, row, column, margin: the first row is below the second


def _claim(table: Table, place: str, words: str, parts: Sequence[Part], *, paper: bool = True) -> Claim:
    found = [
        below(what, table[first][column], table[second][column], margin)
        for what, first, second, column, margin in parts
        if first in table and second in table and column in table[first] and column in table[second]
    ]
    lacking = dict.fromkeys(row for _, first, second, _, _ in parts for row in (first, second) if row not in table)
    missing = f"not measured: {', '.join(lacking)}" if lacking else "" if parts else "not measured: what is compared"
    return Claim(place, words, tuple(found), missing, paper)


def _against(table: Table, rows: Sequence[str]) -> list[Part]:
    return [(_words(ULTRAFUSER, row), ULTRAFUSER, row, MEAN, 0.0) for row in rows]


def _words(first: str, second: str) -> str:
    return f"{first} - {second}"


def _best(m: Measured) -> list[str]:
    """The specialist that is best further tuned, by its mean over the seeds."""
    tuned = [name for name in m.specialists if further_tuned(name) in m.losses]
    return [min(tuned, key=lambda name: fmean(m.losses[further_tuned(name)][MEAN]))] if tuned else []


def _over(curve: Sequence[tuple[int, float]], begin: float, end: float) -> float:
    """Mean training loss of the steps in a part of a run, counted in samples."""
    last = curve[-1][0]
    chosen = [loss for taken, loss in curve if begin * last < taken <= end * last]
    return fmean(chosen or [curve[-1][1]])


def _why(m: Measured, row: str) -> str:
    return f"{row}: {m.left_out.get(row, 'not measured')}"
