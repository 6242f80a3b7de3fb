"""Steps of the trainer on one device beside a plain PyTorch script that trains the same three models.

    python tools/benchmarks/train_beside_plain.py --device cuda --traces FOLDER --out FILE.json

Three Llamas of 1.1 billion parameters with random weights, bf16, both stages. The contenders are the trainer, and
plain_trainer.py with either of its losses (peers.py): `plain PyTorch` mixes n logit tensors, `one GEMM` concatenates.
Each has a process of its own, one after the other, and trains on the same data; seconds are medians of a step's wall
time. The last step of each stage is profiled: a trace for chrome://tracing and the operators that took most. Where a
contender runs out of memory, all of them begin again with fewer layers. Results are written after every contender. On
a CPU everything shrinks to what takes a moment.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from peers import concatenated_loss, plain_loss
from profiling import Trace
from scripting import Parser, positive, result_file, write_json

from ultrafuser_mega.toy.corpus import CLASSES, Row, generate, read_jsonl, write_jsonl

TRAINER, PEERS = "trainer", {"plain PyTorch": plain_loss, "one GEMM": concatenated_loss}
CONTENDERS = (TRAINER, *PEERS)
TRACED = (TRAINER, "plain PyTorch")  # of the others a table will do
PIECES = 400  # of the tokenizer; the heads have the vocabulary's rows all the same
OUT_OF_MEMORY = 3  # exit code of a contender
STEPS_OF_A_STAGE = 1000  # more than are run: the contender stops when it has seen enough


class Size(NamedTuple):
    hidden_size: int
    heads: int
    kv_heads: int
    vocab: int
    max_length: int
    response_characters: int
    per_class: int  # samples of each class in a step
    microbatch: int  # samples
    layers: tuple[int, ...]  # to try, the first that fits
    dtype: str  # as the configuration names it


SIZES = {
    "cuda": Size(2048, 32, 4, 32000, 512, 700, 4, 2, (22, 14), "bf16"),
    "cpu": Size(64, 4, 2, 512, 256, 60, 1, 1, (2,), "fp32"),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-steps", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=6, help="timed, of each stage")
    parser.add_argument("--limit", type=positive, default=60, help="seconds for one contender")
    parser.add_argument("--traces", type=Path, help="folder for the profiler's traces")
    parser.add_argument("--out", type=result_file, help="JSON file")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda: PyTorch finds no CUDA device; use cpu")
    if arguments.contender:
        contend(arguments)
        return
    size = SIZES[arguments.device]
    for layers in size.layers:
        report = {"device": arguments.device, "layers": layers, "size": size._asdict(), "contenders": {}, "failed": {}}
        if not out_of_memory(size, layers, arguments, report):
            break
    show(report)
    if report["failed"]:
        raise SystemExit(1)


def out_of_memory(size: Size, layers: int, arguments: argparse.Namespace, report: dict[str, Any]) -> bool:
    """Lets all contend with so many layers; True if one of them did not fit."""
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        begun = time.perf_counter()
        write_models(Path(folder), size, layers, torch.device(arguments.device))
        report["models_written_s"] = time.perf_counter() - begun
        for name in CONTENDERS:
            result = Path(folder) / "result.json"
            result.unlink(missing_ok=True)
            code = run_contender(name, Path(folder), result, arguments)
            if code == 0:
                report["contenders"][name] = json.loads(result.read_text())
            else:
                report["failed"][name] = "out of memory" if code == OUT_OF_MEMORY else f"exit code {code}"
            if arguments.out:
                write_json(arguments.out, report)
            if code == OUT_OF_MEMORY and layers != size.layers[-1]:
                return True
    return False


def run_contender(name: str, models: Path, result: Path, arguments: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--contender", name, "--models", models, "--out", result]
    command += ["--device", arguments.device, "--warm-steps", arguments.warm_steps, "--steps", arguments.steps]
    if arguments.traces:
        command += ["--traces", arguments.traces]
    try:
        return subprocess.run([str(part) for part in command], timeout=arguments.limit).returncode
    except subprocess.TimeoutExpired:
        return 124


def write_models(root: Path, size: Size, layers: int, device: torch.device) -> None:
    """Three folders of random weights, their data, and the trainer's configuration."""
    from transformers import LlamaForCausalLM

    from ultrafuser_mega.toy import tiny_tokenizer
    from ultrafuser_mega.toy.llama import llama_config, save_llama

    architecture = llama_config(
        vocab_rows=size.vocab, hidden_size=size.hidden_size, layers=layers, heads=size.heads, kv_heads=size.kv_heads,
        rope_theta=1e4,
    )  # fmt: skip
    architecture.initializer_range = 0.02
    (root / "data").mkdir()
    for seed, name in enumerate(CLASSES):
        torch.manual_seed(seed)
        with torch.device(device):
            model = LlamaForCausalLM(architecture)
        model.to(DTYPES[size.dtype])  # type: ignore[arg-type]
        save_llama(model, root / name)
        tiny_tokenizer(root / name, pieces=PIECES)
        split = generate(name, seed=7, train_rows=200, heldout_rows=1)
        rows = longer(split.train, size.response_characters)
        write_jsonl(root / "data" / f"{name}.train.jsonl", rows[1:])
        write_jsonl(root / "data" / f"{name}.heldout.jsonl", rows[:1])
    stage = {"steps": STEPS_OF_A_STAGE, "samples_per_class": size.per_class, "lr": 2e-5}
    templates = {"text": "ultralm", "code": "codellama", "math": "wizardmath"}
    tree = {
        "runs": str(root / "runs"),
        "models": str(root),
        "dtype": size.dtype,
        "device": device.type,
        "specialists": {name: {"path": name, "template": template} for name, template in templates.items()},
        "layouts": [{"kind": "colocated"}],
        "data": {
            "root": str(root / "data"),
            "max_length": size.max_length,
            "classes": {n: {"train": [f"{n}.train.jsonl"], "heldout": [f"{n}.heldout.jsonl"]} for n in CLASSES},
        },
        "microbatch_tokens": size.microbatch * size.max_length,
        "stage1": stage,
        "stage2": stage,
        "checkpoint": {"every": 0},
        "evaluation": {"every": 0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(tree))


def longer(rows: tuple[Row, ...], characters: int) -> tuple[Row, ...]:
    """Rows whose responses are several of ``rows``' in a row, each of about so many characters."""
    made: list[Row] = []
    response = ""
    for row in rows:
        response = f"{response}\n{row.output}" if response else row.output
        if len(response) >= characters:
            made.append(Row(row.instruction, response))
            response = ""
    return tuple(made)


class EnoughError(Exception):
    """All steps that were asked for have been seen."""


@dataclass
class Watch:
    """Times steps from one end to the next and profiles one more; stands where the trainer expects a report."""

    device: torch.device
    warm_steps: int
    steps: int
    trace: Path | None  # the profiler's file
    ends: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    operators: list[dict[str, Any]] = field(default_factory=list)
    _trace: Trace | None = None

    def step(self, record: Any) -> None:
        """After a step; raises EnoughError after the last. record: what the trainer reports of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self._trace is not None:
            self.operators = self._trace.end()
            raise EnoughError
        self.ends.append(time.perf_counter())
        self.tokens.append(record.tokens)
        if len(self.ends) == self.warm_steps + self.steps:
            self._trace = Trace(self.device, self.trace)
            self._trace.begin()

    def begin_stage(self, *_: object) -> None: ...

    def note(self, text: str) -> None:
        print(text)

    def result(self) -> dict[str, Any]:
        first = self.warm_steps - 1
        seconds = [end - begin for begin, end in zip(self.ends[first:], self.ends[first + 1 :], strict=False)]
        rates = [tokens / taken for tokens, taken in zip(self.tokens[first + 1 :], seconds, strict=True)]
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return {
            "median_s": statistics.median(seconds),
            "seconds": seconds,
            "response_tokens_per_s": statistics.median(rates),
            "peak_bytes": peak,
            "operators": self.operators,
        }


def contend(arguments: argparse.Namespace) -> None:
    """The body of a contender's process."""
    device = torch.device(arguments.device)
    name = arguments.contender
    measure = the_trainer if name == TRAINER else plain(PEERS[name])
    result: dict[str, Any] = {}
    begun = time.perf_counter()

    def watched(stage: int) -> Watch:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        path = None
        if arguments.traces and name in TRACED:
            path = arguments.traces / f"trace_{name.replace(' ', '_')}_stage{stage}.json.gz"
        return Watch(device, arguments.warm_steps, arguments.steps, path)

    def done(stage: int, watch: Watch) -> None:
        result[f"stage{stage}"] = watch.result()
        write_json(arguments.out, result | {"whole_s": time.perf_counter() - begun})

    try:
        measure(arguments.models, device, watched, done)
    except torch.OutOfMemoryError as error:
        print(f"{name}: {str(error).splitlines()[0]}")
        raise SystemExit(OUT_OF_MEMORY) from None


Watched = Callable[[int], Watch]  # of a stage
Done = Callable[[int, Watch], None]


def the_trainer(root: Path, device: torch.device, watched: Watched, done: Done) -> None:
    from ultrafuser_mega.checkpoint.progress import Progress
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.planning.preflight import preflight
    from ultrafuser_mega.reporting.run_report import RunReport
    from ultrafuser_mega.runtime.device import joined_job, launcher_store
    from ultrafuser_mega.runtime.groups import make_groups
    from ultrafuser_mega.training.assembly import make_shard
    from ultrafuser_mega.training.prepare import open_store
    from ultrafuser_mega.training.stage import train_stage
    from ultrafuser_mega.training.trainer import Trainer

    plan = preflight(load_config(root / "run.yaml"), 1, resume=False)
    plan.config.run_dir.mkdir(parents=True, exist_ok=True)
    with joined_job(device, launcher_store()):
        groups = make_groups(plan.layout)
        trainer = Trainer(plan, groups, open_store(plan, groups), device, make_shard(plan, groups))
        trainer.load()
        for stage in (1, 2):
            watch = watched(stage)
            with contextlib.suppress(EnoughError):
                train_stage(trainer, Progress(stage, 0), cast(RunReport, watch))
            done(stage, watch)


class PlainRecord(NamedTuple):
    tokens: int


def plain(loss: Callable[..., torch.Tensor]) -> Callable[[Path, torch.device, Watched, Done], None]:
    def measure(root: Path, device: torch.device, watched: Watched, done: Done) -> None:
        from plain_trainer import PlainFuser, PlainTrainer, batches

        from ultrafuser_mega.toy.training import Sample, encode

        size = SIZES[device.type]
        compute = DTYPES[size.dtype]
        samples: dict[str, list[list[Sample]]] = {}
        for name in CLASSES:
            rows = read_jsonl(root / "data" / f"{name}.train.jsonl")
            samples[name] = cut([encode(root / other, other, rows) for other in CLASSES], size.max_length)
        model = PlainFuser({name: root / name for name in CLASSES}, compute, device)
        for stage in (1, 2):
            trainer = PlainTrainer(model, stage, loss, compute)
            watch = watched(stage)
            with contextlib.suppress(EnoughError):
                for microbatches in batches(samples, size.per_class, size.microbatch):
                    watch.step(PlainRecord(trainer.step(microbatches)))
            done(stage, watch)

    return measure


def cut(by_specialist: list[list[Any]], max_length: int) -> list[list[Any]]:
    """Responses cut where the longest specialist's sequence would pass ``max_length``, as the trainer cuts them."""
    found: list[list[Any]] = [[] for _ in by_specialist]
    for same in zip(*by_specialist, strict=True):
        room = max_length - max(len(sample.prompt) for sample in same)
        for of_specialist, sample in zip(found, same, strict=True):
            of_specialist.append(type(sample)(sample.prompt, sample.response[:room]))
    return found


def show(report: dict[str, Any]) -> None:
    print(f"{report['layers']} layers, written in {report['models_written_s']:.0f} s")
    for name, found in report["contenders"].items():
        for stage in ("stage1", "stage2"):
            if run := found.get(stage):
                ratio = run["median_s"] / report["contenders"].get(TRAINER, found)[stage]["median_s"]
                peak = f"{run['peak_bytes'] / 2**30:.1f} GiB" if run["peak_bytes"] else ""
                print(f"{stage} {name:14} {run['median_s'] * 1e3:9.1f} ms {ratio:6.2f} x the trainer "
                      f"{run['response_tokens_per_s']:9.0f} tokens/s {peak}")  # fmt: skip
    for name, reason in report["failed"].items():
        print(f"failed: {name} ({reason})")


if __name__ == "__main__":
    main()
