"""The reproduction's verdicts on made-up numbers: what decides, what leaves a claim open, and what the page says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from reproduction.claims import claims, headroom
from reproduction.measured import Measured
from reproduction.page import write_page
from reproduction.rows import (
    AVERAGE,
    BTX,
    FUSECHAT,
    IID,
    LLAMAFUSER,
    TASK_ARITHMETIC,
    ULTRAFUSER,
    further_tuned,
    on_own_class,
)
from reproduction.verdicts import FAILS, HOLDS, OPEN, Claim, Spread, below

CLASSES = ["text", "code", "math"]


def test_an_interval_over_seeds_is_students() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert spread.mean == 2.0
    assert spread.reach == pytest.approx(4.303 / math.sqrt(3))
    assert Spread.of([1.0]).reach == math.inf


def test_a_difference_decides_where_signs_agree_and_the_interval_leaves_zero_out() -> None:
    high = [1.0, 1.01, 0.99]
    assert below("", [0.5, 0.52, 0.49], high).verdict == HOLDS
    assert below("", high, [0.5, 0.52, 0.49]).verdict == FAILS


def test_signs_that_agree_are_not_enough_where_seeds_scatter() -> None:
    scattered = below("", [0.9, 0.5, 0.1], [1.0, 1.0, 1.0])
    assert all(d < 0 for d in scattered.differences)
    assert scattered.verdict == OPEN


def test_one_seed_or_a_number_that_is_none_decides_nothing() -> None:
    assert below("", [0.0], [5.0]).verdict == OPEN
    assert "one seed" in below("", [0.0], [5.0]).words()
    assert below("", [0.0, math.nan], [5.0, 5.0]).verdict == OPEN


def test_as_good_as_is_a_margin() -> None:
    first, second = [1.010, 1.011, 1.009], [1.0, 1.0, 1.0]
    assert below("", first, second).verdict == FAILS
    assert below("", first, second, margin=0.02).verdict == HOLDS


def test_a_claim_holds_with_all_its_comparisons_and_falls_with_one() -> None:
    good = below("good", [0.0, 0.0], [1.0, 1.0])
    bad, undecided = below("bad", [1.0, 1.0], [0.0, 0.0]), below("undecided", [0.0, 2.0], [1.0, 1.0])
    assert Claim("", "", (good, good)).verdict == HOLDS
    assert Claim("", "", (good, undecided)).verdict == OPEN
    assert Claim("", "", (good, undecided, bad)).verdict == FAILS
    assert "bad" in Claim("", "", (good, undecided, bad)).why()
    assert Claim("", "", (), "no base").verdict == OPEN
    assert Claim("", "", (good, good), "not measured: BTX").verdict == OPEN
    assert "BTX" in Claim("", "", (good, good), "not measured: BTX").why()
    assert Claim("", "", (good, bad), "not measured: BTX").verdict == FAILS


def _measured() -> Measured:
    """Two seeds in which everything is as in the paper, but that balanced batches are no better than iid ones."""
    found = Measured([0, 1], CLASSES, CLASSES)

    def add(row: str, **losses: float) -> None:
        losses["mean"] = sum(losses.values()) / len(losses)
        found.losses[row] = {name: [value, value + 0.001] for name, value in losses.items()}
        found.accuracies[row] = {name: [1 / (1 + value), 1 / (1.001 + value)] for name, value in losses.items()}

    for name in CLASSES:
        add(name, **{other: 0.5 if other == name else 4.0 for other in CLASSES})
        add(further_tuned(name), **{other: 0.8 if other == name else 1.2 for other in CLASSES})
        add(on_own_class(name), **{name: 0.47})
        weights = {other: [0.8 if other == name else 0.1 + 0.02 * (name == "code")] * 2 for other in CLASSES}
        found.gate_per_token[name] = found.gate_per_sample[name] = weights
    for row, loss in ((AVERAGE, 3.0), (TASK_ARITHMETIC, 9.0), (BTX, 1.1), (FUSECHAT, 1.3), (LLAMAFUSER, 0.5)):
        add(row, **dict.fromkeys(CLASSES, loss))
    add(ULTRAFUSER, **dict.fromkeys(CLASSES, 0.45))
    add(IID, **dict.fromkeys(CLASSES, 0.45))
    add("oracle per class", **dict.fromkeys(CLASSES, 0.5))
    add("oracle per sample", **dict.fromkeys(CLASSES, 0.4))
    for row, start in ((ULTRAFUSER, 1.0), (LLAMAFUSER, 1.04), (BTX, 2.0)):
        found.curves[row] = [[(24 * (step + 1), start + 1 / (step + 1)) for step in range(20)]] * 2
    found.checkpoints = {ULTRAFUSER: [[1.0, 0.5, 0.45, 0.44]] * 2, IID: [[1.0, 0.6, 0.40, 0.50]] * 2}
    return found


def _verdicts(measured: Measured) -> dict[str, str]:
    return {claim.words: claim.verdict for claim in claims(measured)}


def _of(verdicts: dict[str, str], *parts: str) -> str:
    (found,) = (verdict for words, verdict in verdicts.items() if all(part in words for part in parts))
    return found


def test_numbers_as_in_the_paper_uphold_its_claims() -> None:
    verdicts = _verdicts(_measured())
    for parts in (
        ("lowest mean loss", "further-tuned"),
        ("lowest mean loss", "merges"),
        ("highest mean accuracy",),
        ("on a par",),
        ("averaged weights",),
        ("task arithmetic",),
        ("lowest loss on its own class",),
        ("largest weight per token",),
        ("largest weight per sample",),
        ("more weight than the text specialist",),
        ("harms a specialist's own class",),
        ("helps in the other classes",),
        ("helps there",),
        ("better on a class than its specialist tuned",),
        ("below BTX's over the first quarter",),
        ("below LlamaFuser's",),
        ("similar level",),
        ("lower standard deviation than rows drawn alike",),
        ("oracle per class",),
    ):
        assert _of(verdicts, *parts) == HOLDS, parts
    assert _of(verdicts, "drawing all rows alike") == OPEN  # no difference at all
    assert _of(verdicts, "oracle per sample") == FAILS
    assert _of(verdicts, "equal samples", "one rate") == OPEN  # not measured


def test_the_headroom_is_between_the_best_tuned_single_and_the_oracle_per_sample() -> None:
    best = (0.8 + 1.2 + 1.2) / 3
    assert headroom(_measured())[0] == pytest.approx((best - 0.45) / (best - 0.4))


def test_a_row_that_a_seed_lacks_is_left_out_and_said() -> None:
    measured = _measured()
    for values in measured.losses[BTX].values():
        values.pop()
    measured.complete()
    assert BTX not in measured.losses and measured.left_out[BTX] == "not of every seed"
    (claim,) = (one for one in claims(measured) if "merges, BTX" in one.words)
    assert claim.verdict == OPEN and "not measured: BTX" in claim.why() and "UltraFuser - average" in claim.why()


def test_the_page_has_a_line_for_every_claim_and_the_file_every_number(tmp_path: Path) -> None:
    measured = _measured()
    found = claims(measured)
    page = write_page(tmp_path, measured, found, {"commit": "abc"}, []).read_text()
    assert all(f"| {claim.words} | **{claim.verdict}** |" in page for claim in found)
    for title in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 6", "Table 8"):
        assert f"## {title}" in page
    document = json.loads((tmp_path / "claims.json").read_text())
    assert [one["verdict"] for one in document["claims"]] == [claim.verdict for claim in found]
