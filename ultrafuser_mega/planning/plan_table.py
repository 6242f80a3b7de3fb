"""A table of what every rank of a planned run holds, for people."""

from __future__ import annotations

from rich import box
from rich.table import Table

from ultrafuser_mega.models.hf_folder import Architecture
from ultrafuser_mega.planning.preflight import RunPlan

# Bytes per parameter. Trained: its weight and a float32 gradient, then two float32 AdamW moments and under bf16 a
# float32 weight, which the distributed optimizer shards over the replicas.
_WEIGHT = {"fp32": 4, "bf16": 2}
_GRADIENT = 4
_OPTIMIZER = {"fp32": 8, "bf16": 12}


def plan_table(plan: RunPlan) -> Table:
    """One row per rank of the first replica: role, vocabulary rows, parameters and bytes of weights and optimizer."""
    layout, config = plan.layout, plan.config
    table = Table(title=layout.describe(), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("rank", "specialist", "tp", "stage", "vocabulary rows"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "stage 1", "stage 2"):
        table.add_column(column, justify="right", no_wrap=True)
    weight, optimizer = _WEIGHT[config.dtype], _OPTIMIZER[config.dtype]
    shards = layout.dp if config.parallel.distributed_optimizer else 1
    fusion = layout.fusion_groups()[0]
    rows = -(-plan.vocab_size // (8 * len(fusion))) * 8
    for rank in range(layout.replica_size):
        names = layout.specialists_on(rank)
        placement = layout.placements[names[0]]
        stage, tensor_rank = divmod(rank - placement.first_rank, placement.tp)
        held = sum(_stage_parameters(plan.architectures[name], placement.tp, placement.pp, stage) for name in names)
        gate, vocabulary = 0, "-"
        if rank in fusion:
            first, stop = (min(end * rows, plan.vocab_size) for end in (fusion.index(rank), fusion.index(rank) + 1))
            vocabulary = f"{first}-{stop - 1}" if stop > first else "padding"
            held += rows * sum(arch.hidden_size for arch in plan.architectures.values())
            gate = _gate_parameters(plan, len(fusion))
        everything = held + gate
        table.add_row(
            str(rank),
            ", ".join(names),
            f"{tensor_rank + 1}/{placement.tp}",
            f"{stage + 1}/{placement.pp}",
            vocabulary,
            f"{everything:,}",
            _size(everything * weight + gate * (_GRADIENT + optimizer)),
            _size(everything * (weight + _GRADIENT + optimizer / shards)),
        )
    table.caption = "stage 1, stage 2: weights, gradients and optimizer state; activations come on top"
    return table


def _stage_parameters(arch: Architecture, tp: int, pp: int, stage: int) -> int:
    attention = arch.hidden_size * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    layer = (attention + 3 * arch.hidden_size * arch.ffn_size) // tp + 2 * arch.hidden_size
    embedding = -(-arch.vocab_rows // tp) * arch.hidden_size if stage == 0 else 0
    return arch.layers // pp * layer + embedding + (arch.hidden_size if stage == pp - 1 else 0)


def _gate_parameters(plan: RunPlan, ranks: int) -> int:
    widths = [arch.hidden_size for arch in plan.architectures.values()]
    inputs = widths[0] if len(set(widths)) == 1 else sum(widths)
    return -(-plan.gate_units // ranks) * (inputs + 2)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
