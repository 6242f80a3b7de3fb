"""A table of what every rank of a planned run holds, for people."""

from __future__ import annotations

from rich.table import Table

from ultrafuser_mega.models.hf_folder import Architecture
from ultrafuser_mega.training.preflight import RunPlan

# Bytes per parameter: bf16 weights; with gradients in fp32, fp32 master weights and two AdamW moments on top.
_FROZEN = {"fp32": 4, "bf16": 2}
_TRAINED = {"fp32": 16, "bf16": 18}


def plan_table(plan: RunPlan) -> Table:
    """One row per rank of the first replica: role, vocabulary rows, parameters and bytes of weights and optimizer."""
    layout, config = plan.layout, plan.config
    table = Table(title=layout.describe(), title_justify="left")
    for column in ("rank", "specialist", "tp", "stage", "vocabulary rows"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "stage 1", "stage 2"):
        table.add_column(column, justify="right", no_wrap=True)
    fusion = layout.fusion_groups()[0]
    rows = -(-plan.vocab_size // (8 * len(fusion))) * 8
    for rank in range(layout.replica_size):
        names = layout.specialists_on(rank)
        placement = layout.placements[names[0]]
        local = rank - placement.first_rank
        stage = local // placement.tp
        held = sum(_stage_parameters(plan.architectures[name], placement.tp, placement.pp, stage) for name in names)
        vocabulary = "-"
        if rank in fusion:
            first = fusion.index(rank) * rows
            vocabulary = f"{min(first, plan.vocab_size)}-{min(first + rows, plan.vocab_size) - 1}"
            held += rows * sum(arch.hidden_size for arch in plan.architectures.values())
        table.add_row(
            str(rank),
            ", ".join(names),
            f"{local % placement.tp + 1}/{placement.tp}",
            f"{stage + 1}/{placement.pp}",
            vocabulary,
            f"{held:,}",
            _size(held * _FROZEN[config.dtype]),
            _size(held * _TRAINED[config.dtype]),
        )
    table.caption = "stage 1, stage 2: weights, gradients and optimizer state; activations come on top"
    return table


def _stage_parameters(arch: Architecture, tp: int, pp: int, stage: int) -> int:
    attention = arch.hidden_size * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    layer = (attention + 3 * arch.hidden_size * arch.ffn_size) // tp + 2 * arch.hidden_size
    embedding = -(-arch.vocab_rows // tp) * arch.hidden_size if stage == 0 else 0
    return arch.layers // pp * layer + embedding + (arch.hidden_size if stage == pp - 1 else 0)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
