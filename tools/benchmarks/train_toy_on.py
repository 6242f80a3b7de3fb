"""Train three tiny specialists on a device through the commands that people use, losses beside the CPU's.

    python tools/benchmarks/train_toy_on.py --device cuda --out FILE.json

Both stages on one rank (NCCL on a GPU), the same run on the CPU at the same time, then a checkpoint, an export and an
answer of the exported model on the device. Specialists are untrained and their data is generated: all of it together
takes less than a minute on a machine with cores to spare. Results are written after every command; exit code 1 if one
of them fails or the losses part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from scripting import Parser, positive, result_file, write_json

from ultrafuser_mega.toy import tiny_llama, tiny_tokenizer
from ultrafuser_mega.toy.corpus import CLASSES, generate, write_jsonl

PIECES = 400
COMMAND = [sys.executable, "-c", "from ultrafuser_mega.cli import main; main()"]
# fp32 on both sides. Before anything has moved the losses differ by the order of sums alone: rounding of a few hundred
# terms per product through a handful of layers. Later Adam amplifies that where a gradient is about zero.
FIRST_STEP, ANY_STEP = 1e-4, 2e-2
TIMED_OUT = 124


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=positive, help="of each stage; default: 10 on a GPU, 2 on a CPU")
    parser.add_argument("--limit", type=positive, default=120, help="seconds for any one command")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda: PyTorch finds no CUDA device; use cpu")
    steps = arguments.steps or (10 if arguments.device == "cuda" else 2)
    report: dict[str, Any] = {"device": arguments.device, "commands": [], "wrong": []}
    with tempfile.TemporaryDirectory(prefix="toy-") as folder:
        try:
            for _ in run(Path(folder), arguments.device, steps, arguments.limit, report):
                if arguments.out:
                    write_json(arguments.out, report)
        except CommandError as error:
            report["wrong"].append(str(error))
        if arguments.out:
            write_json(arguments.out, report)
    for command in report["commands"]:
        print(f"{command['what']:24} {command['seconds']:6.1f} s")
    for losses in report.get("losses", []):
        print(f"stage {losses['stage']} step {losses['step']:3} {arguments.device} {losses['here']:.5f}"
              f" cpu {losses['cpu']:.5f}")  # fmt: skip
    print("answer:", report.get("answer"))
    if report["wrong"]:
        raise SystemExit("\n".join(["WRONG:", *report["wrong"]]))


class CommandError(Exception):
    """A command failed or took too long; carries the end of what it said."""


def run(root: Path, device: str, steps: int, limit: int, report: dict[str, Any]) -> Iterator[None]:
    """Fills ``report``; yields after every command."""
    config = write_trio(root, steps)
    begun = [(where, start("train", "--config", config, "--ranks", "1", f"name={where}_run", f"device={where}"))
             for where in dict.fromkeys(("cpu", device))]  # fmt: skip
    try:
        for where, command in begun:
            finish(command, f"train on {where}", limit, report)
            yield
    finally:
        for _, command in begun:
            command.end()
    compare(root / "runs", device, report)
    yield
    checkpoint = sorted((root / "runs" / f"{device}_run" / "checkpoints").glob("stage2-*"))[-1]
    report["checkpoint"] = checkpoint.name
    finish(start("export", checkpoint, root / "release"), "export", limit, report)
    yield
    question = ("--max-new-tokens", "24", "--device", device)
    answer = finish(start("generate", root / "release", "Add 3 and 4.", *question), "generate", limit, report)
    report["answer"] = answer.strip()[:300]
    yield


def write_trio(root: Path, steps: int) -> Path:
    """Specialists, data and the configuration of a run over them, whose path is returned."""
    rows = {"text": PIECES, "code": PIECES + 16, "math": PIECES + 1}
    (root / "data").mkdir()
    for seed, name in enumerate(CLASSES):
        tiny_llama(
            root / name, vocab_rows=rows[name], hidden_size=64, layers=2, heads=4, kv_heads=2 if name == "code" else 4,
            rope_theta=1e6 if name == "code" else 1e4, seed=seed, dtype=torch.float32,
        )  # fmt: skip
        tiny_tokenizer(root / name, pieces=PIECES)
        split = generate(name, seed=7, train_rows=60, heldout_rows=12)
        write_jsonl(root / "data" / f"{name}.train.jsonl", split.train)
        write_jsonl(root / "data" / f"{name}.heldout.jsonl", split.heldout)
    tree = {
        "runs": str(root / "runs"),
        "models": str(root),
        "specialists": {
            "text": {"path": "text", "template": "ultralm"},
            "code": {"path": "code", "template": "codellama"},
            "math": {"path": "math", "template": "wizardmath"},
        },
        "layouts": [{"kind": "colocated"}],
        "data": {
            "root": str(root / "data"),
            "max_length": 160,
            "classes": {n: {"train": [f"{n}.train.jsonl"], "heldout": [f"{n}.heldout.jsonl"]} for n in CLASSES},
        },
        "stage1": {"steps": steps, "samples_per_class": 4, "lr": 5e-3, "warmup_steps": 2},
        "stage2": {"steps": steps, "samples_per_class": 4, "lr": 5e-4, "warmup_steps": 2},
        "evaluation": {"samples_per_class": 4, "token_views": 1},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclass(frozen=True)
class Command:
    """A command that runs; what it says goes into a file, so that nothing blocks."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    begun: float

    def end(self) -> None:
        """Of no use any more."""
        self.process.kill()
        self.process.wait()
        self.output.close()


def start(*arguments: object) -> Command:
    """``ultrafuser arguments...``"""
    output = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the command
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "160"},
    )
    return Command(process, output, time.perf_counter())


def finish(command: Command, what: str, limit: int, report: dict[str, Any]) -> str:
    """What the command printed; raises CommandError where it fails or takes longer than ``limit`` seconds."""
    try:
        code = command.process.wait(max(1.0, command.begun + limit - time.perf_counter()))
    except subprocess.TimeoutExpired:
        command.process.kill()
        command.process.wait()
        code = TIMED_OUT
    report["commands"].append({"what": what, "seconds": time.perf_counter() - command.begun, "exit_code": code})
    command.output.seek(0)
    said = command.output.read().decode(errors="replace")
    command.output.close()
    if code:
        why = f"not done after {limit} s" if code == TIMED_OUT else f"exit code {code}"
        raise CommandError(f"{what}: {why}: {said.strip()[-1500:]}")
    return said


def compare(runs: Path, device: str, report: dict[str, Any]) -> None:
    """Losses of every step beside the CPU's."""
    here, cpu = (steps_of(runs / f"{where}_run" / "metrics.jsonl") for where in (device, "cpu"))
    report["losses"] = [
        {"stage": a["stage"], "step": a["step"], "here": a["loss"], "cpu": b["loss"]}
        for a, b in zip(here, cpu, strict=True)
    ]
    off = [abs(losses["here"] / losses["cpu"] - 1) for losses in report["losses"]]
    report["loss_off"] = {"first_step": off[0], "any_step": max(off)}
    if off[0] > FIRST_STEP or max(off) > ANY_STEP:
        report["wrong"].append(f"losses part: {off[0]:.1e} at the first step, {max(off):.1e} at most; "
                               f"allowed {FIRST_STEP:.0e} and {ANY_STEP:.0e}")  # fmt: skip


def steps_of(metrics: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


if __name__ == "__main__":
    main()
