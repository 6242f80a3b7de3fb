"""What the chunked loss moves outside its products, counted, against the arithmetic of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.scripts import run_script

TOKENS, VOCAB, WIDTH = 8192, 32000, 5120


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("traffic") / "traffic.json"
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(patch, "loss_traffic", "--out", out) == 0
    return {(r["task"], r["vocabulary"], r["buffers"]): r for r in json.loads(Path(out).read_text())["records"]}


def scaled(shards: int, chunks: int) -> float:
    """Bytes of bf16 training on a GPU with the gate's CUDA kernels, hidden states scaled on the way in."""
    states, logits = TOKENS * 3 * WIDTH, TOKENS * VOCAB // shards
    heads = VOCAB // shards * 3 * WIDTH
    scale, unscale = 4 * states, 8 * states  # h -> x; fp32 dx and h -> dh
    sweep = (4 + 4 + 2) * logits  # the statistics read, dz reads and writes
    parked = 0 if chunks == 1 else 8 * logits + scale  # there and back, and x once more for the heads' product
    upstream = 0 if chunks == 1 else 4 * (states + heads)  # the factor, unless it is known before any product
    return float(scale + unscale + sweep + parked + upstream)


def apart(shards: int) -> float:
    """The same with every specialist's logits in a plane of its own: their sweep, and h without its ignored rows."""
    return float(3 * (4 + 4 + 2) * TOKENS * VOCAB // shards + 4 * TOKENS * 3 * WIDTH)


@pytest.mark.parametrize(
    ("vocabulary", "buffers", "expected"),
    [
        ("whole", "as it is", scaled(1, 2)),
        ("an eighth", "two always", scaled(8, 2)),
        ("an eighth", "one mixture", scaled(8, 1)),
        ("an eighth", "as it is", apart(8)),
    ],
)
def test_the_bytes_counted_are_the_bytes_reckoned(vocabulary: str, buffers: str, expected: float, records: Any) -> None:
    found = records["train", vocabulary, buffers]["total"]
    assert found == pytest.approx(expected, rel=0.02)  # short of numbers per row


def test_one_chunk_for_all_rows_of_an_eighth_saves_parking_a_second_scaling_and_the_upstream_factor(
    records: Any,
) -> None:
    before, after = (records["train", "an eighth", buffers] for buffers in ("two always", "one mixture"))
    assert after["total"] < 0.6 * before["total"]
    assert "copy_" in before["bytes"] and after["bytes"].get("copy_", 0) < TOKENS * 100
    assert after["calls"]["gate_scale_inputs"] == 1 and before["calls"]["gate_scale_inputs"] == 3


def test_logits_apart_move_fewer_bytes_on_an_eighth_than_scaling_hidden_states(records: Any) -> None:
    before, after = (records["train", "an eighth", buffers] for buffers in ("one mixture", "as it is"))
    assert after["total"] < 0.82 * before["total"]
    assert "gate_scale_inputs" not in after["calls"] and "gate_unscale_gradients" not in after["calls"]


@pytest.mark.parametrize(
    ("task", "vocabulary", "bar", "margin"),
    [
        ("train", "whole", 1.15, 0.050),
        ("train", "an eighth", 1.15, 0.019),
        ("gate_only", "whole", 1.2, 0.095),
        ("gate_only", "an eighth", 1.2, 0.090),
    ],
)
def test_what_memory_traffic_leaves_of_the_bars_for_an_h100(
    task: str, vocabulary: str, bar: float, margin: float, records: Any
) -> None:
    """The ratio to bare products at 790 TFLOP/s and 3.0 TB/s; fp32 results and launches have to fit into the margin."""
    assert bar - records[task, vocabulary, "as it is"]["ratio"] == pytest.approx(margin, abs=0.002)
