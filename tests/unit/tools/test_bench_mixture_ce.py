"""The benchmark's command: what it writes and prints, what it draws, and what it refuses before measuring."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import benchmark
import pytest
from benchmark import FLOOR
from support.scripts import run_script, script

NAME = "bench_mixture_ce"
TINY = ("--device", "cpu", "--tokens", 16, "--vocab", 64, "--repeats", 2)
QUICK = (*TINY, "--skip", "torch.compile", "--skip", "megatron")  # nothing to compile or to import


def test_a_tiny_shape_is_measured_printed_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    assert run_script(monkeypatch, NAME, *QUICK, "--out", out) == 0
    report = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    (run,) = report["runs"]
    assert (run["tokens"], run["vocab"], run["dtype"]) == (16, 64, "float32")
    variants = {(r["task"], r["variant"]): r for r in run["results"]}
    for task in benchmark.TASKS:
        for variant in (FLOOR, *benchmark.BACKENDS[task], "plain PyTorch", "one GEMM"):
            record = variants.pop((task, variant))
            assert len(record["seconds"]) == 2
            assert record["ratio_to_floor"] > 0
    assert not variants
    printed = capsys.readouterr().out
    assert all(f"{r['task']:10} {r['variant']:18}" in printed for r in run["results"])
    assert f"wrote {out}" in printed


def test_a_peer_that_is_not_installed_is_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_there() -> None:
        raise ImportError("No module named 'liger_kernel'")

    monkeypatch.setitem(benchmark.PEERS, "liger-kernel", not_there)
    assert run_script(monkeypatch, NAME, *QUICK, "--task", "forward") == 0
    assert "absent: liger-kernel (No module named 'liger_kernel')" in capsys.readouterr().out


def test_the_result_says_what_it_was_measured_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert run_script(monkeypatch, NAME, *QUICK, "--task", "forward", "--out", out) == 0
    machine = json.loads(out.read_text())["machine"]
    assert set(machine) == {
        "device", "cpu", "threads", "python", "torch", "triton", "cuda", "driver", "commit", "date",
    }  # fmt: skip
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert machine["cpu"] in cpuinfo or "model name" not in cpuinfo
    assert machine["device"] == machine["cpu"]
    age = datetime.now(datetime.fromisoformat(machine["date"]).tzinfo) - datetime.fromisoformat(machine["date"])
    assert 0 <= age.total_seconds() < 60
    assert machine["date"].endswith("+00:00")


def test_the_commit_is_that_of_the_checkout_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy without git inside somebody else's repository has no commit."""
    bench = script(NAME)
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c")
    assert bench.output_of(*git, "init", "-q") is None
    assert bench.output_of(*git, "commit", "--allow-empty", "-m", "first") is not None
    (tmp_path / "copy" / "tools" / "benchmarks").mkdir(parents=True)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "copy" / "tools" / "benchmarks" / "bench.py"))
    assert bench.commit() is None
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "tools" / "benchmarks" / "bench.py"))
    assert len(bench.commit()) == 40


@pytest.mark.timeout(200)
def test_megatron_is_measured_in_shards_and_who_cannot_be_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("megatron.core")
    out = tmp_path / "result.json"
    assert run_script(monkeypatch, NAME, *TINY, "--task", "train", "--vocab-shards", 2, "--out", out) == 0
    report = json.loads(out.read_text())
    assert report["shards"] == 2
    assert report["machine"]["threads"] == 1
    (run,) = report["runs"]
    assert [r["variant"] for r in run["results"]] == [FLOOR, "chunked", "megatron"]
    assert set(run["absent"]) == set(benchmark.PEERS) - {"megatron"}
    assert "absent: plain PyTorch (not in shards: needs the logits of the whole" in capsys.readouterr().out


@pytest.mark.timeout(200)
def test_shards_may_be_empty_and_megatron_says_that_it_needs_even_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("megatron.core")
    out = tmp_path / "result.json"
    arguments = ("--device", "cpu", "--tokens", 8, "--vocab", 5, "--repeats", 1, "--vocab-shards", 4)
    assert run_script(monkeypatch, NAME, *arguments, "--task", "train", "--out", out) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert [r["variant"] for r in run["results"]] == [FLOOR, "chunked"]
    assert run["absent"]["train: megatron"] == "needs shards of one size, and 5 rows do not make 4"


def test_several_ranks_are_reported_as_the_slowest_with_the_most_memory_of_any() -> None:
    fast = {"task": "train", "variant": FLOOR, "median_s": 1.0, "peak_extra_bytes": 7, "gradient_bytes": 3}
    slow = fast | {"median_s": 2.0, "peak_extra_bytes": 5, "gradient_bytes": 2}
    (record,) = script(NAME).slowest([{"results": [fast]}, {"results": [slow]}])["results"]
    assert (record["median_s"], record["peak_extra_bytes"], record["gradient_bytes"]) == (2.0, 7, 3)


def test_a_sweep_is_drawn_as_time_against_size_with_a_line_per_variant_and_a_panel_per_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    sweep = (*QUICK, "--sweep", "specialists", "--task", "forward", "--task", "train")
    assert run_script(monkeypatch, NAME, *sweep, "--out", out, "--plot", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(out.read_text())["runs"]
    panels = script(NAME).sweep_figure(runs, "specialists").axes
    assert [panel.get_title() for panel in panels] == ["forward", "train"]
    for panel in panels:
        assert {line.get_label() for line in panel.lines} == {FLOOR, "chunked", "plain PyTorch", "one GEMM"}
        assert [list(line.get_xdata()) for line in panel.lines] == [[1, 2, 3, 5]] * 4
    assert len({line.get_color() for panel in panels for line in panel.lines if line.get_label() == "chunked"}) == 1
    found = {r["task"]: r["median_s"] * 1e3 for r in runs[2]["results"] if r["variant"] == "chunked"}
    (line,) = [line for line in panels[1].lines if line.get_label() == "chunked"]
    assert line.get_ydata()[2] == found["train"]


def test_one_shape_is_drawn_as_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "shape.svg"
    assert run_script(monkeypatch, NAME, *QUICK, "--task", "forward", "--plot", picture) == 0
    assert "<svg" in picture.read_text()


REFUSED = {
    "--tokens 0": "--tokens: 0: needed a whole number of at least 1",
    "--vocab 0": "--vocab: 0: needed",
    "--repeats 0": "--repeats: 0: needed",
    "--tokens -3": "--tokens: -3: needed",
    "--vocab x": "--vocab: x: needed",
    "--vocab-shards 0": "--vocab-shards: 0: needed",
    "--vocab-shards -1": "--vocab-shards: -1: needed",
    "--skip nonsense": "--skip: invalid choice: nonsense (choose from chunked, gate_only, streaming, plain PyTorch",
    "--task train --task forward --task train": "--task: train: given more than once; name each task once",
    "--tokens 3 --sweep tokens": "--tokens: 3: --sweep tokens divides it; needed at least 4",
    "--vocab 7 --sweep vocab": "--vocab: 7: --sweep vocab divides it; needed at least 8",
    "--out /no/such/folder/x.json": "--out: /no/such/folder/x.json: there is no folder /no/such/folder; create it",
    "--out /proc/x.json": "--out: /proc/x.json: no file can be written in /proc",
    "--out /proc": "--out: /proc: is not a regular file; name a file to write",
    "--plot /no/such/folder/x.png": "--plot: /no/such/folder/x.png: there is no folder",
}


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, arguments: str) -> str:
    """The one line with which a script refuses its arguments."""
    assert run_script(monkeypatch, name, *arguments.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("measured in spite of a bad argument")

    monkeypatch.setattr(script(NAME), "run_shape", measured)


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_bad_argument_is_one_line_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_is_measured: Any, arguments: Any
) -> None:
    expected = REFUSED[arguments]
    line = refusal(monkeypatch, capsys, NAME, f"--device cpu {arguments}")
    assert line.startswith("bench_mixture_ce.py: error: argument ")
    assert expected in line.replace("'", "")  # argparse quotes choices in some versions of Python


def test_cuda_without_a_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_is_measured: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refusal(monkeypatch, capsys, NAME, "--device cuda")
    assert line.endswith("argument --device: cuda: PyTorch finds no CUDA device; use cpu\n")


def test_a_picture_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_is_measured: Any, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    line = refusal(monkeypatch, capsys, NAME, f"--device cpu --plot {tmp_path}/x.nonsense")
    assert "matplotlib writes no .nonsense; use .png" in line
    line = refusal(monkeypatch, capsys, NAME, f"--device cpu --plot {tmp_path}/x")
    assert "matplotlib writes no file without a suffix; use .png" in line


@pytest.mark.parametrize("capability", ["70", "123", "80 70", "x"])
def test_the_kernel_report_refuses_a_generation_it_cannot_compile_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], capability: str
) -> None:
    pytest.importorskip("triton")
    line = refusal(monkeypatch, capsys, "report_kernels", f"--capability {capability}")
    assert "argument --capability: invalid " in line
    assert capability.split()[-1] in line


@pytest.mark.parametrize("arguments", ["--tokens 0", "--vocab -1", "--width 0", "--kernel x", "--out /no/such/x.json"])
def test_the_tuner_refuses_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    pytest.importorskip("triton")
    assert refusal(monkeypatch, capsys, "tune_kernels", arguments).startswith(
        f"tune_kernels.py: error: argument {arguments.split()[0]}: "
    )
