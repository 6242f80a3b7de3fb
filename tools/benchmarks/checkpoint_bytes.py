"""Bytes that each of 64 ranks writes of a 13B trio's checkpoint: the program on tensors that hold nothing.

    python tools/benchmarks/checkpoint_bytes.py --out docs/benchmarks/checkpoint_bytes.json

The layout for 64 GPUs of examples/configs/llama2_13b.yaml. Played are the first and the last tensor-parallel rank of
every stage of the first and the last replica, which differ most (rows of vocabularies do not divide evenly); the mean
is that of all ranks, since every byte of the checkpoint is written once. What saving does with tensors until they lie
in host memory runs under the dry run's meter, which counts collectives.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from scripting import Parser, result_file, write_json
from torch._subclasses.fake_tensor import FakeTensorMode
from trio_13b import plan_13b

from ultrafuser_mega.checkpoint.chunks import Chunk, chunks_to_write
from ultrafuser_mega.checkpoint.optimizer_state import create_moments
from ultrafuser_mega.checkpoint.saver import copies_for
from ultrafuser_mega.dry_run.fake_job import joined_fake_job
from ultrafuser_mega.dry_run.meter import Meter
from ultrafuser_mega.dry_run.rehearse import group_names
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.quiet import quiet_dependencies
from ultrafuser_mega.training.assembly import build_model
from ultrafuser_mega.training.optimizer import make_trainable

LAYOUT = {"kind": "colocated", "tp": 8, "pp": 2, "dp": 4}
CPU = torch.device("cpu")


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    quiet_dependencies()
    plan = plan_13b(LAYOUT)
    rows: list[dict[str, Any]] = []
    whole: dict[str, int] = {}
    for rank in ends(plan):
        row, tensors = played(plan, rank)
        whole |= tensors
        rows.append(row)
        print(f"rank {rank}: {row['bytes'] / 1e9:.3f} GB in {row['chunks']} chunks", flush=True)
        report = {"layout": LAYOUT, **summary(rows, sum(whole.values()), plan.layout.world_size), "ranks": rows}
        if arguments.out:
            write_json(arguments.out, report)
    print(f"mean {report['mean'] / 1e9:.3f} GB of {report['whole'] / 1e9:.1f} GB")
    print(f"most over mean {report['most_over_mean']:.4f}, collectives: {report['collectives'] or 'none'}")


def ends(plan: RunPlan) -> Iterator[int]:
    """The first and the last rank of every tensor-parallel group of the first and the last replica."""
    layout, (placement, *_) = plan.layout, plan.layout.placements.values()
    for first in range(0, layout.world_size, placement.tp):
        if layout.replica_of(first) in (0, layout.dp - 1):
            yield from sorted({first, first + placement.tp - 1})


def played(plan: RunPlan, rank: int) -> tuple[dict[str, Any], dict[str, int]]:
    """What the rank writes, and the bytes of each whole tensor of which it does."""
    with joined_fake_job(plan.layout.world_size, rank):
        groups = make_groups(plan.layout)
        meter = Meter("cpu", group_names(groups))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build_model(plan, groups, CPU)
            trainable = make_trainable(
                model,
                model.config,
                groups.megatron,
                plan.config.stage2,
                plan.config.optimizer,
                distributed_optimizer=plan.config.parallel.distributed_optimizer,
                overlap=True,
                device=CPU,
            )
            create_moments(trainable, 1)
            with meter:
                chunks = chunks_to_write(model, trainable, groups)
                copies = copies_for(chunks)
    row = {
        "rank": rank,
        "bytes": sum(map(bytes_of, copies)),
        "chunks": len(chunks),
        "collectives": [f"{one.name} over {one.group}" for one in meter.collectives],
    }
    return row, {chunk.key: whole_bytes(chunk) for chunk in chunks}


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def whole_bytes(chunk: Chunk) -> int:
    """Of the tensor that it is a part of."""
    return math.prod(chunk.shape) * chunk.data.element_size()


def summary(rows: list[dict[str, Any]], whole: int, ranks: int) -> dict[str, Any]:
    """Most and least of those that were played over the mean of all ranks; collectives of any."""
    written = [row["bytes"] for row in rows]
    mean = whole / ranks
    return {
        "whole": whole,
        "mean": mean,
        "mean_of_played": statistics.mean(written),
        "most_over_mean": max(written) / mean,
        "least_over_mean": min(written) / mean,
        "collectives": sorted({collective for row in rows for collective in row["collectives"]}),
    }


if __name__ == "__main__":
    main()
