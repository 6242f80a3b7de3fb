"""The trainer's steps beside a plain script's on one run's models and data: every step is taken by each in turn.

    python tools/benchmarks/steps_beside_plain.py examples/configs/nano_real.yaml models=FOLDER data.root=FOLDER

The contenders are the trainer on one device and plain_trainer.py with either of its losses (peers.py): `plain PyTorch`
mixes n logit tensors, `one GEMM` concatenates. All begin with the same weights and take the same samples at the same
rate, with the run's AdamW; the script's samples are sorted by length and padded, so many to a microbatch. A round is
one step of each, in an order that turns. Seconds are of the whole step, batches included; ratios are of medians.
Losses must be the same to five digits in every step.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from bench_mixture_ce import commit, cpu_model
from peers import concatenated_loss, plain_loss
from plain_trainer import AdamW, PlainFuser, PlainTrainer, Tokens
from scripting import Parser, positive, result_file, write_json

from ultrafuser_mega.config import Stage, load_config
from ultrafuser_mega.data.batches import TrainingBatches
from ultrafuser_mega.data.sampler import Pick
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.models.dtypes import DTYPES
from ultrafuser_mega.planning.preflight import RunPlan, preflight
from ultrafuser_mega.runtime.device import joined_job, launcher_store
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.quiet import quiet_dependencies
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.prepare import open_store
from ultrafuser_mega.training.trainer import Trainer

TRAINER, PEERS = "trainer", {"plain PyTorch": plain_loss, "one GEMM": concatenated_loss}
SAME = 1e-5  # of losses, relative

Step = Callable[[int], float]  # takes step i of a stage; its loss


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-rounds", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=7, help="timed, of each stage")
    parser.add_argument("--microbatch", type=positive, default=4, help="samples in the script's microbatches")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    quiet_dependencies()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "config": arguments.config.name,
        "microbatch": arguments.microbatch,
        "stages": {},
    }
    with tempfile.TemporaryDirectory(prefix="runs-") as runs:
        overrides = [f"runs={runs}", *arguments.overrides]
        plan = preflight(load_config(arguments.config, overrides), 1, resume=False)
        for number, found in measure(plan, torch.device(arguments.device), arguments):
            report["stages"][number] = found
            show(number, found)
            if arguments.out:
                write_json(arguments.out, report)
    if any(found["largest_difference"] > SAME for found in report["stages"].values()):
        raise SystemExit(f"steps_beside_plain: losses differ by more than {SAME:g}")


def measure(plan: RunPlan, device: torch.device, arguments: Any) -> Any:
    """(stage, what was found) of both."""
    config = plan.config
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with joined_job(device, launcher_store()):
        groups = make_groups(plan.layout)
        trainer = Trainer(plan, groups, open_store(plan, groups), device, make_shard(plan, groups))
        trainer.load()
        models = {name: plain_model(trainer, device) for name in PEERS}
        for number in config.stages:
            steps = {TRAINER: trainers_steps(trainer, number)}
            for name, model in models.items():
                steps[name] = plain_steps(trainer, model, number, PEERS[name], arguments.microbatch)
            yield number, in_turn(steps, device, arguments.warm_rounds, arguments.rounds)
            del steps
            gc.collect()


def in_turn(steps: dict[str, Step], device: torch.device, warm: int, rounds: int) -> dict[str, Any]:
    """Seconds of wall and CPU of every contender's steps, and their losses."""
    names = list(steps)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begun, used = time.perf_counter(), time.process_time()
            losses[name].append(steps[name](i))
            if device.type == "cuda":
                torch.cuda.synchronize()
            wall[name].append(time.perf_counter() - begun)
            cpu[name].append(time.process_time() - used)
    found = {
        name: {
            "median_s": statistics.median(wall[name][warm:]),
            "median_cpu_s": statistics.median(cpu[name][warm:]),
            "seconds": wall[name][warm:],
            "losses": losses[name],
        }
        for name in names
    }
    ours = losses[TRAINER]
    return {
        "contenders": found,
        "largest_difference": max(abs(a / b - 1) for name in names for a, b in zip(losses[name], ours, strict=True)),
    }


def trainers_steps(trainer: Trainer, number: int) -> Step:
    """Those of the trainer's stage."""
    stage = trainer.stage(number)
    seed = trainer.plan.config.seed + number
    batches = TrainingBatches(trainer.store, stage.samples_per_class, seed, trainer.shard)
    trainable = trainer.make_trainable(number)
    return lambda step: trainer.step(number, trainable, batches, step, time.perf_counter())[0].loss


def rate_of(stage: Stage, step: int) -> float:
    """Of a stage's step, from 0: a linear warm-up, then a cosine whose zero lies one step after the last."""
    k, warmup = step + 1, stage.warmup_steps
    if k <= warmup:
        return stage.lr * k / warmup
    if stage.schedule == "constant":
        return stage.lr
    first = max(warmup, 1)
    turned = math.pi * (k - first) / (stage.steps - first + 1)
    return stage.min_lr + (stage.lr - stage.min_lr) * (1 + math.cos(turned)) / 2


def plain_model(trainer: Trainer, device: torch.device) -> PlainFuser:
    """The run's folders, and the trainer's gate as it is."""
    plan = trainer.plan
    model = PlainFuser(plan.config.folders, DTYPES[plan.config.dtype], device, plan.gate_units)
    fusion, gate = trainer.model.fusion, cast(Any, model.gate)
    assert fusion is not None
    w1, _, w2 = gate
    with torch.no_grad():
        w1.weight.copy_(fusion.gate.w1["shared"][: plan.gate_units])
        w1.bias.copy_(fusion.gate.b1[: plan.gate_units])
        w2.weight.copy_(fusion.gate.w2[None, : plan.gate_units])
    return model


def plain_steps(
    trainer: Trainer,
    model: PlainFuser,
    number: int,
    loss: Callable[..., torch.Tensor],
    microbatch: int,
) -> Step:
    """Those of the plain script, on the samples of the trainer's."""
    config, stage = trainer.plan.config, trainer.stage(number)
    o = config.optimizer
    options = AdamW(stage.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, o.clip_grad)
    script = PlainTrainer(model, number, loss, DTYPES[config.dtype], options)
    batches = trainer.batches(number)

    def step(i: int) -> float:
        samples = tokens_of(trainer.store, batches.sampler.batch(i), list(config.specialists))
        samples.sort(key=lambda sample: max(len(one.ids) for one in sample))
        cut = [samples[at : at + microbatch] for at in range(0, len(samples), microbatch)]
        script.step([list(zip(*part, strict=True)) for part in cut], rate_of(stage, i))
        return float(script.last_loss)

    return step


def tokens_of(store: TokenStore, picks: Sequence[Pick], specialists: Sequence[str]) -> list[list[Tokens]]:
    """(sample, specialist): the training samples ``picks``."""
    found = []
    for class_name, index in picks:
        sample = store.split(class_name, "train")[index]
        by_specialist = []
        for name in specialists:
            ids: list[int] = []
            places: list[int] = []
            for prompt, response in zip(sample.prompts_of(name), sample.responses, strict=True):
                ids += prompt.tolist()
                places += range(len(ids), len(ids) + len(response))
                ids += response.tolist()
            by_specialist.append(Tokens(ids, places))
        found.append(by_specialist)
    return found


def show(number: int, found: dict[str, Any]) -> None:
    """A line for each contender."""
    ours = found["contenders"][TRAINER]
    for name, one in found["contenders"].items():
        wall, cpu = (one[key] / ours[key] for key in ("median_s", "median_cpu_s"))
        print(
            f"stage {number} {name:14} {one['median_s'] * 1e3:8.0f} ms  {wall:5.2f} x the trainer"
            f"  CPU {one['median_cpu_s'] * 1e3:8.0f} ms  {cpu:5.2f} x  last loss {one['losses'][-1]:.6f}"
        )
    print(f"stage {number} losses differ by {found['largest_difference']:.1e} at most")


if __name__ == "__main__":
    main()
