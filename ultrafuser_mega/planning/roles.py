"""What each rank of a planned run is, and the parameters that it holds for that."""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser_mega.config import GATE, HEADS, Lora
from ultrafuser_mega.models.families import FAMILIES
from ultrafuser_mega.models.hf_folder import Architecture
from ultrafuser_mega.models.lora import linear_maps
from ultrafuser_mega.models.pipeline import stage_layers
from ultrafuser_mega.planning.preflight import RunPlan

_ROW_MULTIPLE = 8  # vocabulary rows of a rank, as the fusion head pads them


@dataclass(frozen=True)
class Role:
    """What a rank is in its replica; stages and tensor ranks count from 0.

    Attributes:
        names: specialists that have a stage on the rank.
        layers: specialist -> decoder layers of this stage.
        fusion: ranks of the fusion group, 0 on a rank outside of it.
        vocab_rows: rows of every head that the rank holds, padding among them.
        vocabulary: those that are real; None outside of the fusion group.
        gate_units: hidden units of the gate that the rank holds, padding among them.
        matrices: parameters of the layers' linear maps, per specialist.
        parameters: all that the rank holds.
        tensors: tensors that they are in.
        parts: parameters of gate, heads and the rank's specialists, without adapters, which add up to that.
        own_heads: of the heads' those that can train: in a distillation the student's alone.
        adapters: specialist -> parameters of its adapters, which ``parameters`` has too.
        adapter_tensors: specialist -> tensors that they are in.
        adapter_products: specialist -> FLOPs of its adapters' products, forward, in parts of 2 per token.
        norms: parameters whose gradients tensor-parallel ranks sum under sequence parallelism.
    """

    names: tuple[str, ...]
    tp: int
    pp: int
    tensor_rank: int
    stage: int
    layers: dict[str, int]
    fusion: int
    vocab_rows: int
    vocabulary: range | None
    gate_units: int
    matrices: dict[str, int]
    parameters: int
    tensors: int
    parts: dict[str, int]
    own_heads: int
    adapters: dict[str, int]
    adapter_tensors: dict[str, int]
    adapter_products: dict[str, float]
    norms: int

    @property
    def is_first(self) -> bool:
        """Of the pipeline, and so holder of embeddings."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Of the pipeline, and so of the fusion group."""
        return self.stage == self.pp - 1


def role_of(plan: RunPlan, rank: int) -> Role:
    """The role of ``rank``, which every replica repeats."""
    layout, archs = plan.layout, plan.architectures
    local = rank % layout.replica_size
    names = tuple(layout.specialists_on(local))
    placement = layout.placements[names[0]]
    tp, pp = placement.tp, placement.pp
    stage, tensor_rank = divmod(local - placement.first_rank, tp)
    layers = {name: stage_layers(archs[name].layers, pp)[stage] for name in names}
    matrices = {name: layers[name] * layer_matrices(archs[name], tp) for name in names}
    norms = {
        name: layers[name] * _layer_norms(archs[name]) + archs[name].hidden_size * (stage == pp - 1) for name in names
    }
    parts = {GATE: 0, HEADS: 0}
    for name in names:
        table = -(-archs[name].vocab_rows // tp) * archs[name].hidden_size if stage == 0 else 0
        parts[name] = norms[name] + matrices[name] + layers[name] * _layer_biases(archs[name], tp) + table
    tensors = sum(layers[name] * _layer_tensors(archs[name]) + (stage == 0) + (stage == pp - 1) for name in names)
    adapted = {name: lora for name, lora in plan.config.adapters.items() if name in names}
    parts_of_row = tp if plan.config.parallel.sequence_parallel else 1
    adapters = {name: _Adapters.of(archs[name], lora, tensor_rank, tp, parts_of_row) for name, lora in adapted.items()}
    fusion, gate, rows, real, units = 0, 0, 0, None, 0
    if stage == pp - 1:
        members = layout.fusion_groups()[0]
        fusion, place = len(members), members.index(local)
        rows = -(-plan.vocab_size // (_ROW_MULTIPLE * fusion)) * _ROW_MULTIPLE
        real = range(min(place * rows, plan.vocab_size), min((place + 1) * rows, plan.vocab_size))
        units = -(-plan.gate_units // fusion)
        gate = units * (gate_width({name: archs[name] for name in plan.config.fused}) + 2)
        parts |= {GATE: gate, HEADS: rows * sum(arch.hidden_size for arch in archs.values())}
        tensors += len(archs) + 3
    return Role(
        names=names,
        tp=tp,
        pp=pp,
        tensor_rank=tensor_rank,
        stage=stage,
        layers=layers,
        fusion=fusion,
        vocab_rows=rows,
        vocabulary=real,
        gate_units=units,
        matrices=matrices,
        parameters=sum(parts.values()) + sum(layers[name] * one.parameters for name, one in adapters.items()),
        tensors=tensors,
        parts=parts,
        own_heads=parts[HEADS] if plan.config.student is None else rows * archs[plan.config.student].hidden_size,
        adapters={name: layers[name] * one.parameters for name, one in adapters.items()},
        adapter_tensors={name: layers[name] * one.tensors for name, one in adapters.items()},
        adapter_products={name: layers[name] * one.products for name, one in adapters.items()},
        norms=sum(norms.values()),
    )


@dataclass(frozen=True)
class _Adapters:
    """Of one layer on one rank."""

    parameters: int
    tensors: int
    products: float  # numbers of the matrices that a token is multiplied with

    @classmethod
    def of(cls, arch: Architecture, lora: Lora, rank: int, tp: int, parts: int) -> _Adapters:
        """``parts``: of the sequence, on whose hidden states what is whole on every rank computes."""
        parameters, tensors, products = 0, 0, 0.0
        for one in linear_maps(arch, rank, tp):
            adapted = [part for part in one.projections if part.name in lora.targets]
            inputs = one.projections[0].inputs // (tp if one.to_hidden else 1)
            parameters += lora.rank * sum(inputs + part.rows for part in adapted)
            tensors += 2 * len(adapted)
            if adapted:  # the product with all B has the rows of all projections
                rows = sum(part.rows for part in one.projections)
                each = inputs + rows / parts if one.to_hidden else inputs / parts + rows
                products += lora.rank * len(adapted) * each
        return cls(parameters, tensors, products)


def distinct_ranks(plan: RunPlan) -> list[int]:
    """One rank of each specialist (disjoint) and stage, in order: all others do what one of these does.

    Of a stage the first tensor-parallel rank, which holds real vocabulary rows wherever one of its stage does.
    """
    placements = dict.fromkeys(plan.layout.placements.values())
    return [rank for placement in placements for rank in placement.ranks[:: placement.tp]]


def layer_matrices(arch: Architecture, tp: int) -> int:
    """Parameters of a rank's share of a layer's four linear maps: query, key and value, output, and the MLP's two."""
    heads = 2 * arch.heads // tp + 2 * arch.kv_heads_of_rank(tp)
    return arch.hidden_size * (heads * arch.head_dim + 3 * arch.ffn_size // tp)


def gate_width(archs: dict[str, Architecture]) -> int:
    """Inputs of a hidden unit of the gate: one row for all specialists of one width, else one for each."""
    widths = [arch.hidden_size for arch in archs.values()]
    return widths[0] if len(set(widths)) == 1 else sum(widths)


def _layer_norms(arch: Architecture) -> int:
    return 2 * arch.hidden_size + (2 * arch.head_dim if FAMILIES[arch.family].qk_norm else 0)


def _layer_biases(arch: Architecture, tp: int) -> int:
    return (arch.heads // tp + 2 * arch.kv_heads_of_rank(tp)) * arch.head_dim if FAMILIES[arch.family].qkv_bias else 0


def _layer_tensors(arch: Architecture) -> int:
    family = FAMILIES[arch.family]
    return 6 + family.qkv_bias + 2 * family.qk_norm
