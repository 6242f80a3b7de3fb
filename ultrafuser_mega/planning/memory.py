"""What every rank of a planned run will hold: parameters, and the bytes of weights, gradients and optimizer state."""

from __future__ import annotations

from ultrafuser_mega.models.hf_folder import Architecture
from ultrafuser_mega.models.pipeline import stage_layers
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.reporting.plan_table import RankShare

# Bytes per parameter. Trained: its weight and a float32 gradient, then two float32 AdamW moments and under bf16 a
# float32 weight, which the distributed optimizer shards over the replicas.
_WEIGHT = {"fp32": 4, "bf16": 2}
_GRADIENT = 4
_OPTIMIZER = {"fp32": 8, "bf16": 12}


def rank_shares(plan: RunPlan) -> list[RankShare]:
    """Each rank of the first replica; the other replicas hold the same."""
    return [_rank_share(plan, rank) for rank in range(plan.layout.replica_size)]


def _rank_share(plan: RunPlan, rank: int) -> RankShare:
    layout, config = plan.layout, plan.config
    names = layout.specialists_on(rank)
    placement = layout.placements[names[0]]
    stage, tensor_rank = divmod(rank - placement.first_rank, placement.tp)
    held = sum(_stage_parameters(plan.architectures[name], placement.tp, placement.pp, stage) for name in names)
    fusion, gate, rows = layout.fusion_groups()[0], 0, None
    if rank in fusion:
        padded = -(-plan.vocab_size // (8 * len(fusion))) * 8
        place = fusion.index(rank)
        rows = range(min(place * padded, plan.vocab_size), min((place + 1) * padded, plan.vocab_size))
        held += padded * sum(arch.hidden_size for arch in plan.architectures.values())
        gate = _gate_parameters(plan, len(fusion))
    everything = held + gate
    weight, optimizer = _WEIGHT[config.dtype], _OPTIMIZER[config.dtype]
    shards = layout.dp if config.parallel.distributed_optimizer else 1
    bytes_of = {
        1: everything * weight + gate * (_GRADIENT + optimizer),
        2: everything * (weight + _GRADIENT + optimizer / shards),
    }
    return RankShare(
        rank=rank,
        specialists=tuple(names),
        tensor=(tensor_rank, placement.tp),
        stage=(stage, placement.pp),
        vocabulary_rows=rows,
        parameters=everything,
        stage_bytes={number: bytes_of[number] for number in config.stages},
    )


def _stage_parameters(arch: Architecture, tp: int, pp: int, stage: int) -> int:
    heads = 2 * arch.heads // tp + 2 * arch.kv_heads_of_rank(tp)
    layer = arch.hidden_size * (heads * arch.head_dim + 3 * arch.ffn_size // tp + 2)
    embedding = -(-arch.vocab_rows // tp) * arch.hidden_size if stage == 0 else 0
    return stage_layers(arch.layers, pp)[stage] * layer + embedding + (arch.hidden_size if stage == pp - 1 else 0)


def _gate_parameters(plan: RunPlan, ranks: int) -> int:
    widths = [arch.hidden_size for arch in plan.architectures.values()]
    inputs = widths[0] if len(set(widths)) == 1 else sum(widths)
    return -(-plan.gate_units // ranks) * (inputs + 2)
