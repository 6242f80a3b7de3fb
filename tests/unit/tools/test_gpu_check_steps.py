"""The steps of tools/gpu_check.sh on the CPU: the same code on small sizes, so that a first GPU finds no slip in it."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import Shape
from support.scripts import TOOLS, run_script, script

CPU = torch.device("cpu")
TINY = {"tiny": Shape(9, 37, (8, 12), torch.float32)}


def test_values_of_every_backend_of_a_cpu_are_right_and_streaming_says_that_it_needs_a_gpu() -> None:
    records = list(script("check_values").check(CPU, TINY))
    outcomes = {(r["case"], r["dtype"]): r["outcome"] for r in records}
    assert len(outcomes) == len(records) == 6 * 3
    for (case, _), outcome in outcomes.items():
        assert outcome == ("not here" if case.startswith("streaming") else "right")
    assert all(r["errors"].keys() <= r["allowed"].keys() for r in records)


@pytest.mark.parametrize(
    ("factors", "outcome"), [((1.01, 1.01), "WRONG"), ((1.0, 1.0 + 1e-6), "other bits"), ((1.0, 1.0), "right")]
)
def test_a_wrong_value_and_one_that_does_not_repeat_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, factors: Any, outcome: Any
) -> None:
    values = script("check_values")
    right, turns = values.mixture_cross_entropy, iter(factors)
    monkeypatch.setattr(values, "mixture_cross_entropy", lambda *args, **more: right(*args, **more) * next(turns))
    monkeypatch.setattr(values, "CASES", (("chunked", values.EVERYTHING),))
    monkeypatch.setattr(values, "DTYPES", (torch.float32,))
    (record,) = values.check(CPU, TINY)
    assert record["outcome"] == outcome


def test_a_backend_that_raises_is_a_record_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    values = script("check_values")

    def raising(*_: object, backend: str, **__: object) -> torch.Tensor:
        raise RuntimeError(f"{backend} does not launch\nwith details")

    monkeypatch.setattr(values, "mixture_cross_entropy", raising)
    found = {(r["outcome"], r.get("failed")) for r in values.check(CPU, TINY) if r["case"].startswith("chunked")}
    assert found == {("failed", "chunked does not launch")}


def test_the_losss_profile_has_a_table_per_backend_and_a_trace_that_opens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, trace = tmp_path / "profile.json", tmp_path / "trace.json.gz"
    assert run_script(monkeypatch, "profile_loss", "--device", "cpu", "--out", out, "--trace", trace) == 0
    tables = json.loads(out.read_text())["operators"]
    assert set(tables) == {"train, chunked", "gate_only, gate_only", "gate_only, chunked"}
    for rows in tables.values():
        assert any("mm" in row["name"] for row in rows)
        assert [row["own_ms"] for row in rows] == sorted((row["own_ms"] for row in rows), reverse=True)
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {path.name for path in tmp_path.iterdir()} == {out.name, trace.name}


def test_what_is_warmed_first_is_what_the_goals_shapes_take_and_last_what_the_tuner_tries() -> None:
    pytest.importorskip("triton")
    warm, tuner = script("warm_kernels"), script("tune_kernels")
    jobs = list(warm.jobs(["goal", "tests", "candidates"]))
    goal = len(warm.DTYPES) * len(warm.KERNELS)
    assert {(job.kernel, job.dtype) for job in jobs[:goal]} == {(k, d) for k in warm.KERNELS for d in warm.DTYPES}
    assert all(job.config is None and (job.widths, job.vocab) == warm.GOAL for job in jobs[:goal])
    tried = [(job.kernel, job.config) for job in jobs if job.config is not None]
    assert tried == [(kernel, config) for kernel in warm.KERNELS for config in tuner.CANDIDATES[kernel]]
    assert tried == [(job.kernel, job.config) for job in jobs[-len(tried) :]]


def epilogues_of_the_goal(cache: str) -> int:
    """Kernels in ``cache`` after the chunked epilogue of a GPU has looked at rows of the goal's whole vocabulary."""
    os.environ["TRITON_CACHE_DIR"] = cache
    from absent_gpu import AbsentGpu

    from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue

    AbsentGpu(90).stand_in()
    rows, ones = torch.zeros(3, 32000), torch.ones(3)
    epilogue, target = TritonEpilogue(torch.bfloat16), torch.zeros(3, dtype=torch.long)
    epilogue.statistics(rows, target, keep=True)
    epilogue.dlogits(rows, None, target, ones, (ones, ones, 0 * ones))
    return len(list(Path(cache).glob("*/*.cubin")))


@pytest.mark.timeout(280)
def test_warmed_kernels_are_found_by_a_launch_of_another_process_on_the_goals_shape(
    tmp_path: Path, compiling: Any
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, str(TOOLS / "benchmarks" / "warm_kernels.py"), "--processes", "1", "--part", "goal"]
    command += ["--kernel", "chunked: row statistics", "--kernel", "chunked: dlogits"]
    command += ["--out", str(tmp_path / "warm.json")]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    subprocess.run(command, env=environment, check=True, timeout=250)
    report = json.loads((tmp_path / "warm.json").read_text())
    assert len(report["kernels"]) == report["jobs"] == 2 * 3
    assert not any("failed" in kernel for kernel in report["kernels"])
    warmed = len(list(cache.glob("*/*.cubin")))
    assert warmed == 1 + 3  # fp32 statistics whatever the operands' type, a gradient in each type
    assert compiling(epilogues_of_the_goal, str(cache)) == warmed


def candidate_compiled(cache: str) -> tuple[int, bool]:
    """Kernels in ``cache`` after one of the tuner's tiles, and whether the table is what it was."""
    os.environ["TRITON_CACHE_DIR"] = cache
    from ultrafuser_mega.ops.streaming_tiles import TILES, Tile

    warm, before = script("warm_kernels"), dict(TILES["gate statistics"])
    warm.stand_in(90)
    warm.compile_one(warm.Job("gate statistics", "bf16", *warm.GOAL, Tile(64, 32, 64, 4, 2, tma=True)), 90)
    return len(list(Path(cache).glob("*/*.cubin"))), TILES["gate statistics"] == before


@pytest.mark.timeout(280)
def test_the_tuners_tiles_compile_without_a_gpu(tmp_path: Path, compiling: Any) -> None:
    assert compiling(candidate_compiled, str(tmp_path)) == (1, True)


def test_the_toy_runs_configuration_is_one_that_training_takes(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.planning.preflight import preflight

    plan = preflight(load_config(script("train_toy_on").write_trio(tmp_path, steps=2)), 1, resume=False)
    assert plan.vocab_size == script("train_toy_on").PIECES


@pytest.mark.parametrize(
    ("here", "wrong"), [([6.0, 5.0], False), ([6.0001, 5.05], False), ([6.01, 5.0], True), ([6.0, 5.2], True)]
)
def test_losses_that_part_from_the_cpus_are_wrong(tmp_path: Path, here: Any, wrong: Any) -> None:
    for name, losses in (("cpu", [6.0, 5.0]), ("cuda", here)):
        (tmp_path / f"{name}_run").mkdir()
        lines = [json.dumps({"kind": "step", "stage": 1, "step": i, "loss": loss}) for i, loss in enumerate(losses)]
        (tmp_path / f"{name}_run" / "metrics.jsonl").write_text("\n".join(lines))
    report: dict[str, Any] = {"wrong": []}
    script("train_toy_on").compare(tmp_path, "cuda", report)
    assert bool(report["wrong"]) == wrong
    assert [losses["here"] for losses in report["losses"]] == here


@pytest.mark.parametrize(
    ("code", "limit", "said"),
    [
        ("print('done')", 60, None),
        ("import sys; sys.exit('no such thing')", 60, "train: exit code 1: no such thing"),
        ("import time; print('slow', flush=True); time.sleep(60)", 2, "train: not done after 2 s"),
    ],
)
def test_a_command_that_fails_or_hangs_ends_the_toy_run_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, code: Any, limit: Any, said: Any
) -> None:
    toy = script("train_toy_on")
    monkeypatch.setattr(toy, "COMMAND", [sys.executable, "-c", code])
    report: dict[str, Any] = {"commands": []}
    if said is None:
        assert toy.finish(toy.start(), "train", limit, report) == "done\n"
    else:
        with pytest.raises(toy.CommandError, match=said):
            toy.finish(toy.start(), "train", limit, report)
    (command,) = report["commands"]
    assert (command["exit_code"] == 0) == (said is None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the contenders train on a CPU."""
    pytest.importorskip("transformers")
    beside = script("train_beside_plain")
    folder = tmp_path_factory.mktemp("models")
    beside.write_models(folder, beside.SIZES["cpu"], 2, CPU)
    return folder


def contending(arguments: list[str]) -> None:
    """The script in a process of its own, which the trainer's process groups need."""
    sys.argv = ["train_beside_plain.py", *arguments]
    script("train_beside_plain").main()


@pytest.mark.timeout(280)
def test_the_trainer_contends(models: Any, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    arguments = ["--contender", "trainer", "--models", str(models), "--device", "cpu"]
    arguments += ["--warm-steps", "1", "--steps", "1", "--out", str(tmp_path / "out.json")]
    process = multiprocessing.get_context("forkserver").Process(target=contending, args=(arguments,))
    process.start()
    process.join(250)
    assert process.exitcode == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for stage in ("stage1", "stage2"):
        assert len(result[stage]["seconds"]) == 1 and result[stage]["median_s"] > 0
        assert result[stage]["response_tokens_per_s"] > 0 and result[stage]["operators"]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_plain_script_that_takes_the_same_steps_in_turn_has_the_same_losses(models: Any, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    command = [sys.executable, str(TOOLS / "benchmarks" / "steps_beside_plain.py"), str(models / "run.yaml")]
    command += ["--device", "cpu", "--warm-rounds", "1", "--rounds", "2", "--microbatch", "2"]
    subprocess.run([*command, "--out", str(tmp_path / "out.json")], check=True, timeout=250)  # fails if losses differ
    stages = json.loads((tmp_path / "out.json").read_text())["stages"]
    assert list(stages) == ["1", "2"]
    for stage in stages.values():
        assert len(stage["contenders"]) == 3
        assert all(len(one["seconds"]) == 2 and len(one["losses"]) == 3 for one in stage["contenders"].values())


@pytest.mark.parametrize("name", ["plain PyTorch", "one GEMM"])
def test_the_plain_script_contends(models: Any, tmp_path: Path, name: str) -> None:
    beside = script("train_beside_plain")
    arguments = types.SimpleNamespace(
        device="cpu", contender=name, models=models, traces=None, warm_steps=1, steps=2, out=tmp_path / "out.json"
    )
    beside.contend(arguments)
    result = json.loads((tmp_path / "out.json").read_text())
    assert [len(result[stage]["seconds"]) for stage in ("stage1", "stage2")] == [2, 2]
    assert any("mm" in row["name"] for row in result["stage2"]["operators"])


def test_the_plain_script_trains_the_gate_alone_then_everything_and_its_losses_fall(models: Any) -> None:
    plain, beside = script("plain_trainer"), script("train_beside_plain")
    from ultrafuser_mega.toy.corpus import CLASSES, read_jsonl
    from ultrafuser_mega.toy.training import encode

    rows = {name: read_jsonl(models / "data" / f"{name}.train.jsonl")[:2] for name in CLASSES}
    samples = {n: beside.cut([encode(models / o, o, rows[n]) for o in CLASSES], 256) for n in CLASSES}
    step = next(plain.batches(samples, 1, 2))
    assert [len(microbatch[0]) for microbatch in step] == [2, 1]  # three samples in microbatches of two
    responses = [[[[s.ids[at] for at in s.responses] for s in samples] for samples in m] for m in step]
    assert all(m[0] == other for m in responses for other in m[1:])
    losses: list[float] = []

    def watched(*arguments: object, **options: object) -> torch.Tensor:
        loss = beside.PEERS["plain PyTorch"](*arguments, **options)
        losses.append(float(loss.detach()))
        return loss

    model = plain.PlainFuser({name: models / name for name in CLASSES}, torch.float32, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for stage, moved in ((1, {"gate"}), (2, {"gate", "specialists"})):
        trainer = plain.PlainTrainer(model, stage, watched, torch.float32)
        for _ in range(3):
            assert trainer.step(step) == sum(len(s.responses) for m in step for s in m[0])
        changed = {n.split(".")[0] for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        assert changed == moved
    assert sum(losses[-2:]) < sum(losses[:2])
