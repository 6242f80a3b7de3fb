"""The tables made of a GPU's results: records of the true structure with the numbers that a test needs in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest
from benchmark import FLOOR
from support.scripts import run_script, script

MIB = 1 << 20
MILLISECONDS = {  # of every variant, so that each bar is met
    "train": {
        FLOOR: 10.0, "chunked": 11.0, "streaming": 16.0, "plain PyTorch": 20.0, "one GEMM": 19.0, "megatron": 18.0,
    },
    "gate_only": {
        FLOOR: 4.0, "gate_only": 4.5, "streaming": 4.8, "chunked": 8.0, "plain PyTorch": 14.0, "one GEMM": 13.0,
        "megatron": 12.0,
    },
    "forward": {FLOOR: 4.0, "chunked": 4.4, "streaming": 5.0, "plain PyTorch": 9.0, "one GEMM": 8.5, "megatron": 8.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the benchmark leaves of a tiny shape, with every variant that a GPU with one peer installed has."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("liger-kernel", "cut-cross-entropy"):
            patch.setitem(benchmark.PEERS, name, not_installed)
        patch.setitem(benchmark.PEERS, "megatron", benchmark.plain)
        patch.setattr(benchmark, "BACKENDS", {t: (*b, "streaming") for t, b in benchmark.BACKENDS.items()})
        ours = benchmark.ours
        patch.setattr(benchmark, "ours", lambda name: ours("auto" if name == "streaming" else name))
        arguments = ("--device", "cpu", "--tokens", 16, "--vocab", 64, "--repeats", 1, "--skip", "torch.compile")
        assert run_script(patch, "bench_mixture_ce", *arguments, "--out", out) == 0
    return json.loads(out.read_text())


def not_installed() -> None:
    raise ImportError("No module named 'peer'")


def part(measured: dict[str, Any], vocab: int, width: int) -> dict[str, Any]:
    """A step's results with the numbers of MILLISECONDS, as if of one of the bars' shapes."""
    copy = json.loads(json.dumps(measured))
    (run,) = copy["runs"]
    run |= {"tokens": 8192, "vocab": vocab, "widths": [width] * 3, "dtype": "bfloat16"}
    for r in run["results"]:
        r["median_s"] = MILLISECONDS[r["task"]][r["variant"]] / 1e3
        r["ratio_to_floor"] = MILLISECONDS[r["task"]][r["variant"]] / MILLISECONDS[r["task"]][FLOOR]
        r["gradient_bytes"] = 100 * MIB
        r["peak_extra_bytes"] = (100 + (60 if r["variant"] == "streaming" else 1000)) * MIB
    return copy


def gate_kernels(of_copy: float) -> dict[str, Any]:
    record = {"variant": "kernel", "median_us": 100.0, "gb_per_s": 2000.0, "of_copy": of_copy}
    names = [(shape, direction) for shape in ("llama2-13b", "llama3-8b") for direction in ("forward", "backward")]
    return {"device": "H100", "results": [record | {"shape": s, "direction": d} for s, d in names]}


@pytest.fixture
def complete(measured: Any) -> dict[str, Any]:
    return {
        "steps": {"build": {"seconds": 20, "exit_code": 0}, "tests": {"seconds": 150, "exit_code": 124}, "tiles": {}},
        "llama2-13b": part(measured, 32000, 5120),
        "llama2-13b_eighth": part(measured, 4000, 5120),
        "llama3-8b": part(measured, 128256, 4096),
        "llama3-8b_eighth": part(measured, 16032, 4096),
        "gate_kernels": gate_kernels(0.9),
        "tiles": {"device": "H100", "kernels": {"dlogits": tuned()}},
    }


def tuned() -> list[dict[str, Any]]:
    """The tuner's own records, as they come out of JSON."""
    pytest.importorskip("triton")
    tuner = script("tune_kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "timed", lambda call: {"ms": call()})
        times = {(128, 8): 2.0, (256, 8): 1.5}
        table = {"dlogits": (128, 8)}
        records = tuner.tune(lambda: times[table["dlogits"]], table, "dlogits", [(128, 8), (256, 8), (512, 8)])
    return json.loads(json.dumps(records))


def made_of(report: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    source = folder / "nvidia_h100.json"
    source.write_text(json.dumps(report))
    assert run_script(monkeypatch, "gpu_report", source) == 0
    return (folder / "nvidia_h100.md").read_text().splitlines()


def cells(text: list[str], *first: str) -> list[str]:
    """The cells of the one row that begins with ``first``."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("|")]
    (row,) = [row for row in rows if tuple(row[: len(first)]) == first]
    return row


BARS = {  # what, which number of the shape breaks it
    "train, chunked: x bare GEMMs": ("train", "chunked", 11.6),
    "train, chunked: best peer's time / its own": ("train", "megatron", 10.9),
    "gate_only, the better backend: x bare GEMMs": ("gate_only", ("gate_only", "streaming"), 4.81),
    "gate_only, the better backend: best peer's time / its own": ("gate_only", "plain PyTorch", 7.1),
    "forward, streaming: x bare GEMMs": ("forward", "streaming", 5.1),
}
MEMORY_BARS = {
    "train, chunked: MiB beyond gradients": ("chunked", 1025),
    "train, streaming: MiB beyond gradients": ("streaming", 65),
}
SHAPES = {
    "llama2-13b": "llama2-13b",
    "llama2-13b, an eighth": "llama2-13b_eighth",
    "llama3-8b": "llama3-8b",
    "llama3-8b, an eighth": "llama3-8b_eighth",
}


def test_every_bar_of_every_shape_is_met_by_numbers_that_keep_it(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = made_of(complete, tmp_path, monkeypatch)
    for shape in SHAPES:
        for what in (*BARS, *MEMORY_BARS):
            assert cells(text, shape, what)[4] == "met"
    assert cells(text, "llama2-13b", "train, chunked: x bare GEMMs")[2:4] == ["<= 1.15", "1.10"]
    assert cells(text, "llama3-8b", "train, streaming: MiB beyond gradients")[2:4] == ["<= 64", "60.0"]
    assert cells(text, "llama2-13b", "gate kernel, backward: of a copy's bandwidth")[2:5] == [">= 85 %", "90.0%", "met"]
    assert not any("MISSED" in line for line in text)


@pytest.mark.parametrize("what", BARS)
def test_a_number_beyond_its_bar_is_missed_in_its_shape_alone(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    task, variants, milliseconds = BARS[what]
    for r in complete["llama3-8b"]["runs"][0]["results"]:
        if r["task"] == task and r["variant"] in variants:
            r["median_s"] = milliseconds / 1e3
            r["ratio_to_floor"] = milliseconds / MILLISECONDS[task][FLOOR]
    text = made_of(complete, tmp_path, monkeypatch)
    verdicts = {shape: cells(text, shape, what)[4] for shape in SHAPES}
    assert verdicts == dict.fromkeys(SHAPES, "met") | {"llama3-8b": "**MISSED**"}


@pytest.mark.parametrize("what", MEMORY_BARS)
def test_a_mebibyte_too_many_is_missed(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    variant, mib = MEMORY_BARS[what]
    for r in complete["llama2-13b_eighth"]["runs"][0]["results"]:
        if r["variant"] == variant:
            r["peak_extra_bytes"] = (100 + mib) * MIB
    text = made_of(complete, tmp_path, monkeypatch)
    assert cells(text, "llama2-13b, an eighth", what)[3:5] == [f"{mib}.0", "**MISSED**"]
    assert cells(text, "llama2-13b", what)[4] == "met"


def test_a_gate_kernel_below_the_copys_share_is_missed(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete["gate_kernels"] = gate_kernels(0.849)
    text = made_of(complete, tmp_path, monkeypatch)
    assert cells(text, "llama3-8b", "gate kernel, forward: of a copy's bandwidth")[3:5] == ["84.9%", "**MISSED**"]


def test_the_worst_of_several_runs_of_a_shape_counts(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile takes part in a run of its own, which must not hide behind the first."""
    again = json.loads(json.dumps(complete["llama2-13b"]))
    (run,) = again["runs"]
    run["results"] = [r for r in run["results"] if r["variant"] != "megatron"]
    compiled = next(r for r in run["results"] if (r["task"], r["variant"]) == ("train", "plain PyTorch")) | {
        "variant": "torch.compile",
        "median_s": 10.5e-3,
    }
    run["results"].append(compiled)
    text = made_of(complete | {"llama2-13b_compiled": again}, tmp_path, monkeypatch)
    row = cells(text, "llama2-13b", "train, chunked: best peer's time / its own")
    assert row[3:] == ["0.95", "**MISSED**", "absent: liger-kernel, cut-cross-entropy"]


def test_what_no_run_of_the_very_shape_measured_is_not_measured(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete["llama3-8b"]["runs"][0]["tokens"] = 4096
    del complete["gate_kernels"], complete["llama2-13b_eighth"]
    results = complete["llama2-13b"]["runs"][0]["results"]
    complete["llama2-13b"]["runs"][0]["results"] = [r for r in results if r["variant"] != "streaming"]
    complete["llama2-13b"]["runs"][0]["absent"]["forward: streaming"] = "out of memory"
    text = made_of(complete, tmp_path, monkeypatch)
    for shape in ("llama3-8b", "llama2-13b, an eighth"):
        for what in (*BARS, *MEMORY_BARS):
            assert cells(text, shape, what)[3:5] == ["", "not measured"]
    forward = cells(text, "llama2-13b", "forward, streaming: x bare GEMMs")
    assert forward[4:] == ["not measured", "forward: streaming failed (out of memory)"]
    assert cells(text, "llama2-13b", "gate kernel, forward: of a copy's bandwidth")[4] == "not measured"


def test_a_shapes_table_has_every_variant_beside_the_floor_and_the_best_peer(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = made_of({"steps": {}, "llama2-13b": complete["llama2-13b"]}, tmp_path, monkeypatch)
    tflops = next(r["tflops"] for r in complete["llama2-13b"]["runs"][0]["results"] if r["variant"] == "streaming")
    found = cells(text, "train", "streaming")
    assert found == ["train", "streaming", "16.00", "1.60", "0.80", "0.84", "0.89", f"{tflops:.1f}", "160", "60"]
    assert cells(text, "train", "megatron")[6] == "1.00"
    assert "- absent: liger-kernel (No module named 'peer')" in text
    assert "- absent: torch.compile (left out of this run)" in text
    assert cells(text, "torch") == ["torch", complete["llama2-13b"]["machine"]["torch"]]


def test_the_fastest_tile_stands_beside_the_one_in_use(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = made_of(complete, tmp_path, monkeypatch)
    assert cells(text, "dlogits") == ["dlogits", "[256, 8]", "1.500", "[128, 8]", "2.000", "1"]


def test_steps_say_how_they_ended(complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = made_of(complete, tmp_path, monkeypatch)
    assert cells(text, "build") == ["build", "20", "done"]
    assert cells(text, "tests") == ["tests", "150", "ran into its limit"]
    assert cells(text, "tiles") == ["tiles", "", "left out: no time"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": []}'])
def test_another_file_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    source = tmp_path / "other.json"
    if content is not None:
        source.write_text(content)
    assert run_script(monkeypatch, "gpu_report", source) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"gpu_report.py: error: {source}: ")
    assert line.count("\n") == 1
    assert not source.with_suffix(".md").exists()


def test_a_decoder_layers_kernels_stand_beside_a_copy(
    complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {
        "operation": "swiglu_forward",
        "variant": "kernel",
        "median_us": 90.0,
        "gb_per_s": 2500.0,
        "of_copy": 0.91,
    }
    complete["layer_kernels"] = {"device": "H100", "results": [record | {"shape": "llama3-8b"}]}
    row = cells(made_of(complete, tmp_path, monkeypatch), "llama3-8b", "swiglu_forward", "kernel")
    assert row[3:6] == ["90.0", "2500", "91.0%"]


def test_what_a_save_takes_is_in_the_report(
    complete: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"median": 0.04, "least": 0.03, "most": 0.06}
    lost = {"waited for": {"median": 9.0, "least": 8.0, "most": 10.0}, "in the background": few}
    part = {"bytes_written": 5e9, "steps": 3, "lost": lost, "memory": {"over_bytes_written": 1.08}}
    complete["checkpoint"] = part | {"ratio": few, "ratio_until_done": few}
    text = made_of(complete, tmp_path, monkeypatch)
    assert cells(text, "background / waited for")[1:] == ["0.040", "0.030", "0.060"]
    assert "Host memory of the save: 1.08 x what it writes" in text
