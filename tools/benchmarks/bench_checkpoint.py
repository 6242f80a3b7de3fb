"""What a save costs: seconds that training loses, in the background over waiting for it, and host memory.

    python tools/benchmarks/bench_checkpoint.py --out docs/benchmarks/checkpoint.json
    torchrun --nproc-per-node N tools/benchmarks/bench_checkpoint.py ...       # N replicas

Three Llamas of random weights are trained with the distributed optimizer (float32 on a CPU, bfloat16 on a GPU). A round
is three windows of as many steps, in an order that turns: without a save; behind one that is waited for; behind one in
the background. A window counts the save AND the steps, since a save that contends with the steps behind it would look
free otherwise; one in the background also counts until it is done, when that takes more steps. Lost is what a window
takes longer than as many steps of the one without a save of its round. Rank 0's seconds are reported. Where cores are
shared, CPU time says more: that of a save, and what of it training's own thread spends when it is in the background.

Memory is the process's, at its largest during the first save over what it was before, in parts of what the rank writes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from bench_mixture_ce import commit, cpu_model
from scripting import Parser, positive, result_file, write_json
from trio_13b import plan_13b

from ultrafuser_mega.checkpoint.chunks import Chunk, chunks_to_write
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.saver import Saver
from ultrafuser_mega.checkpoint.sources import SourceFiles
from ultrafuser_mega.data.batches import TrainingBatches
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.dry_run.samples import UniformStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.runtime.device import choose_device, joined_job, launched_ranks, launcher_store
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.quiet import quiet_dependencies
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.trainer import Trainer

NONE, WAITED_FOR, IN_BACKGROUND = "no save", "waited for", "in the background"
KINDS = (NONE, WAITED_FOR, IN_BACKGROUND)
PUBLISHED = 0.04  # 6.3 s of 148.8 s, a 7B model: torchtitan

Window = dict[str, float]  # what one took, in seconds


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--tokens", type=positive, default=128, help="of a sample; a step takes one of each class")
    parser.add_argument("--steps", type=positive, default=3, help="of a window")
    parser.add_argument("--rounds", type=positive, default=6)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints go")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    quiet_dependencies()
    device = choose_device(arguments.device)
    with joined_job(device, launcher_store()), tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = measure(small_plan(arguments, dist.get_world_size()), device, Path(folder), arguments)
        if dist.get_rank() == 0:
            for line in told(report):
                print(line)
            if arguments.out:
                write_json(arguments.out, report)
        dist.barrier()


def small_plan(arguments: Any, ranks: int) -> RunPlan:
    """Three Llamas of the size that is asked for on ``ranks`` replicas."""
    dtype = "bf16" if arguments.device == "cuda" else "fp32"
    stage = {"steps": 10_000, "samples_per_class": ranks, "lr": 1e-5}
    plan = plan_13b(
        {"kind": "colocated", "dp": ranks},
        dtype=dtype,
        device=arguments.device,
        parallel={"distributed_optimizer": True},
        microbatch_tokens=3 * arguments.tokens,
        stage1=stage | {"steps": 0},
        stage2=stage,
    )
    hidden = arguments.hidden
    sizes = {"hidden_size": hidden, "ffn_size": 8 * hidden // 3 // 32 * 32, "layers": arguments.layers}
    heads = {"heads": hidden // 64, "kv_heads": hidden // 64, "head_dim": 64}
    archs = {name: replace(arch, **sizes, **heads) for name, arch in plan.architectures.items()}
    return replace(plan, architectures=archs, gate_units=hidden)


def measure(plan: RunPlan, device: torch.device, folder: Path, arguments: Any) -> dict[str, Any]:
    """Memory of the first save, then the rounds."""
    trainer, step = training(plan, device, arguments.tokens)
    files = SourceFiles({}) if dist.get_rank() == 0 else None
    saver, trainable = Saver(folder, 1, 0, {}, files), trainer.make_trainable(2)
    for number in range(2):
        step(number, trainable)
    taken = [2]

    def next_step() -> None:
        step(taken[0], trainable)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken[0] += 1

    def save() -> None:
        saver.save(Progress(2, taken[0]), chunks_to_write(trainer.model, trainable, trainer.groups))

    size = bytes_of(chunks_to_write(trainer.model, trainable, trainer.groups))

    def save_whole() -> None:
        save()
        settle(saver)

    memory = memory_of(save_whole)
    windows: dict[str, list[Window]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds):
        for kind in (*KINDS[number % 3 :], *KINDS[: number % 3]):
            windows[kind].append(window(kind, arguments.steps, next_step, save, saver))
            settle(saver)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cores": psutil.cpu_count(),
        "ranks": launched_ranks(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "bytes_written": size,
        "steps": arguments.steps,
        "memory": memory | {"over_bytes_written": memory["extra"] / size},
        "windows": windows,
        **losses(windows),
    }


def training(plan: RunPlan, device: torch.device, tokens: int) -> tuple[Trainer, Callable[[int, Any], None]]:
    """A trainer of random weights, and what takes its step i."""
    groups = make_groups(plan.layout)
    names = list(plan.architectures)
    store = UniformStore(names, names, samples=8 * plan.layout.dp, length=tokens, response=tokens - 1)
    trainer = Trainer(plan, groups, cast(TokenStore, store), device, make_shard(plan, groups, pad_id=0))
    generator = torch.Generator(device).manual_seed(plan.config.seed)  # replicas hold the same
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    stage = plan.config.stage2
    batches = TrainingBatches(trainer.store, stage.samples_per_class, plan.config.seed, trainer.shard)
    return trainer, lambda number, trainable: trainer.step(2, trainable, batches, number, 0.0) and None


def window(kind: str, steps: int, step: Callable[[], None], save: Callable[[], None], saver: Saver) -> Window:
    """Seconds of one, of its save's call, and, in the background, of what it took until the save was done."""
    dist.barrier()
    begun, used, of_all = time.perf_counter(), time.thread_time(), time.process_time()
    if kind != NONE:
        save()
    if kind == WAITED_FOR:
        settle(saver)
    found = {"save": time.perf_counter() - begun}
    for _ in range(steps):
        step()
    found["whole"] = time.perf_counter() - begun
    found |= {"own_cpu": time.thread_time() - used, "cpu": time.process_time() - of_all}
    taken = steps
    while kind == IN_BACKGROUND and anyone(saver.is_writing):
        step()
        taken += 1
    return found | {"until_done": time.perf_counter() - begun, "steps_until_done": taken}


def settle(saver: Saver) -> None:
    """Wait for the save that is under way, which must succeed."""
    if problem := saver.wait():
        raise InputError(problem)


def anyone(mine: bool) -> bool:
    """Whether it is so on any rank."""
    found = [False] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return any(found)


def losses(windows: dict[str, list[Window]]) -> dict[str, Any]:
    """Seconds lost by each kind of save in each round, and the ratios of the two."""
    plain = [of_round["whole"] / of_round["steps_until_done"] for of_round in windows[NONE]]  # of a step

    def lost(kind: str, what: str, steps: Callable[[Window], float]) -> list[float]:
        return [one[what] - steps(one) * step for one, step in zip(windows[kind], plain, strict=True)]

    waited, within = (
        lost(kind, "whole", lambda _: windows[NONE][0]["steps_until_done"]) for kind in (WAITED_FOR, IN_BACKGROUND)
    )
    until_done = lost(IN_BACKGROUND, "until_done", lambda one: one["steps_until_done"])
    own, of_all = (
        [one[what] - without[what] for one, without in zip(windows[kind], windows[NONE], strict=True)]
        for kind, what in ((IN_BACKGROUND, "own_cpu"), (WAITED_FOR, "cpu"))
    )
    return {
        "step": spread(plain),
        "cpu": {"of a save": spread(of_all), "of it training's thread": spread(own)},
        "lost": {
            WAITED_FOR: spread(waited),
            IN_BACKGROUND: spread(within),
            f"{IN_BACKGROUND}, until it is done": spread(until_done),
            "of it the call": spread([one["save"] for one in windows[IN_BACKGROUND]]),
        },
        "ratio": spread([few / many for few, many in zip(within, waited, strict=True)]),
        "ratio_until_done": spread([few / many for few, many in zip(until_done, waited, strict=True)]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def bytes_of(chunks: Sequence[Chunk]) -> int:
    """Of their numbers."""
    return sum(chunk.data.numel() * chunk.data.element_size() for chunk in chunks)


def memory_of(act: Callable[[], object]) -> dict[str, int]:
    """Bytes of this process before, and at most more during ``act``; Linux alone tells."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is what it is now
    before = status("VmRSS")
    act()
    return {"before": before, "extra": status("VmHWM") - before}


def status(field: str) -> int:
    """Bytes that /proc/self/status says."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def told(report: dict[str, Any]) -> list[str]:
    """Lines for people."""
    memory, lost = report["memory"], report["lost"]

    def seconds(of: dict[str, float]) -> str:
        return f"{of['median']:.2f} s ({of['least']:.2f} to {of['most']:.2f})"

    return [
        f"{report['ranks']} x {report['device']}: {report['parameters'] / 1e6:.0f} M parameters, "
        f"{report['bytes_written'] / 1e9:.2f} GB written by rank 0, a step {seconds(report['step'])}",
        *(f"lost, {kind}: {seconds(of)}" for kind, of in lost.items()),
        *(f"CPU time {what}: {seconds(of)}" for what, of in report["cpu"].items()),
        *(
            f"{name}: {of['median']:.3f} ({of['least']:.3f} to {of['most']:.3f}), published {PUBLISHED}"
            for name, of in (("ratio", report["ratio"]), ("ratio until done", report["ratio_until_done"]))
        ),
        f"host memory of a save: {memory['over_bytes_written']:.2f} x what is written",
    ]


if __name__ == "__main__":
    main()
