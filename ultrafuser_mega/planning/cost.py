"""What a microbatch and a step cost a rank: products, memory traffic, collectives. Arithmetic from the plan alone.

Symbols as in ``memory.py``: of one specialist on one rank T tokens, d hidden size, t tensor-parallel ranks, b bytes of
a number, W parameters of the rank's linear maps; N response tokens, D = sum of all d, V vocabulary rows of the rank, n
specialists, u gate units of the rank.

Products of stage 2 (FLOPs):

    layers      6 T W                     2 forward, 4 backward; 2 T W once more for what is recomputed
    attention   14 h e sum s^2 / t        4 forward, 10 backward, whole squares as PyTorch counts them; flash attention
                                          leaves out the masked half
    head        6 N V D                   2 for the logits, 4 for both gradients
    gate        6 N d u n

Stage 1: 2 T W, 4 h e sum s^2 / t, 2 N V D and 4 N d u n.

Collectives (bytes of the whole tensor: an all-gather's result, a reduce-scatter's operand), per layer and microbatch of
stage 2, b T d each: with sequence parallelism 6 all-gathers and 4 reduce-scatters (forward 2 and 2, backward 4 and 2),
without it 4 all-reduces; 2 and 2, or 2, more where recomputed. Beside the layers the embedding's and the final gather,
the exchange's gather of complete gradients, and once a step the norms' gradients (float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser_mega.planning.memory import (
    NUMBER,
    Device,
    RankMemory,
    exchange_numbers,
    in_planes,
    rank_memory,
    recomputed_layers,
)
from ultrafuser_mega.planning.microbatch import Microbatch
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import Role, role_of

_WIDE = 4
_STATISTICS = 5  # float32 numbers of a row that the loss's ranks share
_BACK_AND_FORTH = 3  # products of a linear map in stage 2, in parts of its forward's


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind.

    Attributes:
        group: "tp", "pp", "dp" or "fusion".
        ranks: the group's, as ranks of the job.
        calls: how many.
        nbytes: of the whole tensors, all calls together.
        passes: times that a tensor travels: 2 for an all-reduce.
        per_step: of a step; else of a microbatch.
        beside: FLOPs of the products next to it, all calls together, that need it or make it.
        under: of products that it travels under.
    """

    group: str
    ranks: tuple[int, ...]
    calls: int
    nbytes: float
    passes: int = 1
    per_step: bool = False
    beside: float = 0.0
    under: float = 0.0


@dataclass(frozen=True)
class RankCost:
    """What a rank holds and does.

    Attributes:
        memory: by kind.
        products: FLOPs of a microbatch's matrix products, by kind: layers, attention, head, gate.
        traffic: its collectives.
        moved: bytes through the GPU's memory in a microbatch outside of products: elementwise, and weights' gradients
            added to the buffer.
        moved_per_step: the same of a step: clearing, norm and clipping of gradients, AdamW.
        read: bytes of weights that the products of a microbatch read at the least.
        layers: decoder layers that the rank runs forward and backward; recomputed ones a third more.
        tensors: of parameters.
    """

    memory: RankMemory
    products: dict[str, float]
    traffic: tuple[Traffic, ...]
    moved: dict[str, float]
    moved_per_step: float
    read: float
    layers: float
    tensors: int

    def group_bytes(self, group: str, *, per_step: bool) -> float:
        """Of a group's collectives, in a microbatch or those that come once a step."""
        return sum(one.nbytes for one in self.traffic if one.group == group and one.per_step == per_step)


@dataclass(frozen=True)
class Program:
    """Which of its possible savings the program has: by default those of today; others to say what they would bring.

    Attributes:
        fused_nodes: one kernel for each of the elementwise nodes' directions.
        fused_weight_gradients: products add a weight's gradient to the buffer.
        gradient_overlap: replicas' sums of gradients travel under the last microbatch's backward.
        weight_overlap: the distributed optimizer's weights are gathered under the first microbatch's forward.
        tensor_overlap: tensor-parallel collectives that are waited for come in two parts, each under a part of the
            product next to it.
    """

    fused_nodes: bool = True
    fused_weight_gradients: bool = True
    gradient_overlap: bool = True
    weight_overlap: bool = True
    tensor_overlap: bool = False


TODAY = Program()


def rank_cost(
    plan: RunPlan,
    rank: int,
    microbatch: Microbatch,
    *,
    fullest: Microbatch | None = None,
    stage: int = 2,
    microbatches: int | None = None,
    device: Device = "cuda",
    program: Program = TODAY,
) -> RankCost:
    """Cost of ``rank`` for a microbatch; see :func:`rank_memory` for the arguments.

    ``fullest``: the microbatch that memory is counted for; default: the same.
    """
    role = role_of(plan, rank)
    largest = fullest or microbatch
    memory = rank_memory(plan, rank, largest, stage=stage, microbatches=microbatches, device=device)
    return RankCost(
        memory=memory,
        products=_products(plan, role, microbatch, stage),
        traffic=tuple(_traffic(plan, role, rank, microbatch, stage, device)),
        moved=_moved(plan, role, microbatch, stage, program),
        moved_per_step=_moved_per_step(plan, role, stage),
        read=(_BACK_AND_FORTH if stage == 2 else 1) * NUMBER[plan.config.dtype] * sum(role.matrices.values()),
        layers=sum(_runs(plan, role, name, stage) * layers / 3 for name, layers in role.layers.items()),
        tensors=role.tensors if stage == 2 else 3,
    )


def _runs(plan: RunPlan, role: Role, name: str, stage: int) -> float:
    """Forward passes that the products of a layer amount to, on the average of the rank's layers."""
    if stage == 1:
        return 1.0
    return _BACK_AND_FORTH + recomputed_layers(plan, role.layers[name]) / role.layers[name]


def _products(plan: RunPlan, role: Role, microbatch: Microbatch, stage: int) -> dict[str, float]:
    layers = attention = 0.0
    for name in role.names:
        arch = plan.architectures[name]
        layers += 2 * _runs(plan, role, name, stage) * microbatch.tokens[name] * role.matrices[name]
        scores = 4 * arch.heads * arch.head_dim / role.tp * microbatch.squares[name] * role.layers[name]
        attention += scores * (_runs(plan, role, name, stage) + (0.5 if stage == 2 else 0))  # backward: 2.5 forwards
    widths = [arch.hidden_size for arch in plan.architectures.values()]
    rows = microbatch.rows
    return {
        "layers": layers,
        "attention": attention,
        "head": (6 if stage == 2 else 2) * rows * len(role.vocabulary or ()) * sum(widths),
        "gate": (6 if stage == 2 else 4) * rows * role.gate_units * sum(widths),
    }


def _traffic(
    plan: RunPlan, role: Role, rank: int, microbatch: Microbatch, stage: int, device: Device
) -> Sequence[Traffic]:
    width, layout = NUMBER[plan.config.dtype], plan.layout
    sequence = plan.config.parallel.sequence_parallel and role.tp > 1
    trains = stage == 2
    found: list[Traffic] = []
    states = {name: width * microbatch.tokens[name] * plan.architectures[name].hidden_size for name in role.names}
    if role.tp > 1:
        group = _group_of(layout.tensor_groups(role.names[0]), rank)
        calls, nbytes = 0, 0.0
        for name in role.names:
            again = recomputed_layers(plan, role.layers[name]) if trains else 0
            found += _of_layers(plan, role, name, group, states[name], microbatch.tokens[name], again, trains)
            # The embedding's sum and, with sequence parallelism, its gradient's gather and the last hidden states'.
            own = role.is_first * (1 + (sequence and trains)) + (role.is_last and sequence)
            calls, nbytes = calls + own, nbytes + own * states[name]
        found.append(Traffic("tp", group, calls, nbytes, 1 if sequence else 2))
        if role.is_last and trains:
            own_rows = width * microbatch.rows * sum(plan.architectures[name].hidden_size for name in role.names)
            found.append(Traffic("tp", group, len(role.names), own_rows))
        if sequence and trains:
            found.append(Traffic("tp", group, 1, _WIDE * role.norms, 2, per_step=True))
    if role.fusion > 1:
        group = _group_of(layout.fusion_groups(), rank)
        numbers = exchange_numbers(plan, role, microbatch.rows)
        rows = microbatch.rows * _WIDE
        if layout.kind == "disjoint":
            found.append(Traffic("fusion", group, 1, numbers * width))
        if trains:
            found.append(Traffic("fusion", group, 1, numbers * _WIDE))
        # The gate's gradient: part of the statistics, or summed up from what the chunked loss makes of the products.
        mixed = trains and not in_planes(plan, role, microbatch.rows, device)
        columns = _STATISTICS + (0 if mixed else 3 * len(plan.architectures))
        found.append(Traffic("fusion", group, 1, rows * columns * role.fusion))
        found.append(Traffic("fusion", group, 1 + mixed, (1 + mixed) * rows * len(plan.architectures), 2))
    if role.pp > 1:
        group = _group_of(layout.pipeline_groups(role.names[0]), rank)
        ways = (not role.is_first) + (not role.is_last)
        handed = sum(states.values()) / (role.tp if sequence else 1)
        found.append(Traffic("pp", group, ways * (1 + trains), ways * (1 + trains) * handed))
    if layout.dp > 1:
        group = _group_of(layout.data_groups(), rank)
        trained = role.parameters if trains else role.gate
        if trains and plan.config.parallel.distributed_optimizer:
            found.append(Traffic("dp", group, 1, _WIDE * trained, per_step=True))
            found.append(Traffic("dp", group, 1, width * trained, per_step=True))
        else:
            found.append(Traffic("dp", group, 1, _WIDE * trained, 2, per_step=True))
    return found


def _of_layers(
    plan: RunPlan,
    role: Role,
    name: str,
    group: tuple[int, ...],
    state: float,
    tokens: float,
    again: int,
    trains: bool,
) -> list[Traffic]:
    """Tensor-parallel traffic of a specialist's layers, ``again`` of which run forward twice.

    With sequence parallelism every linear map has a collective before or behind it, forward, and in the backward those
    to the hidden size a gather before both of their products. Those from the hidden size have two more, which Megatron
    lets travel under products as large as their own: the input's gather under that for its gradient, this gradient's
    scatter under that for the weight's. Without, a sum behind each map to the hidden size, and in the backward of those
    from it the gradient's, under the product for the weight's.
    """
    arch, layers = plan.architectures[name], role.layers[name]
    found = []
    queries = arch.heads // role.tp * arch.head_dim
    maps = (  # inputs or outputs of the hidden size; whether it is the input
        (queries + 2 * arch.kv_heads_of_rank(role.tp) * arch.head_dim, True),
        (queries, False),
        (2 * arch.ffn_size / role.tp, True),
        (arch.ffn_size / role.tp, False),
    )
    for width, gathers in maps:
        product = 2 * tokens * arch.hidden_size * width
        calls = layers + again
        if not plan.config.parallel.sequence_parallel:
            if not gathers:
                found.append(Traffic("tp", group, calls, calls * state, 2, beside=calls * product))
            elif trains:
                found.append(Traffic("tp", group, layers, layers * state, 2, under=layers * product))
            continue
        found.append(Traffic("tp", group, calls, calls * state, beside=calls * product))
        if trains and gathers:
            found.append(Traffic("tp", group, 2 * layers, 2 * layers * state, under=2 * layers * product))
        elif trains:
            found.append(Traffic("tp", group, layers, layers * state, beside=2 * layers * product))
    return found


def _group_of(groups: Sequence[Sequence[int]], rank: int) -> tuple[int, ...]:
    return next(tuple(group) for group in groups if rank in group)


def _moved(plan: RunPlan, role: Role, microbatch: Microbatch, stage: int, program: Program) -> dict[str, float]:
    """Bytes through memory of what is no product.

    Per number of a hidden state's part, in bytes, each operation reading and writing once (norms go through float32):
    a norm 5 b + 8 forward and 4 b + 52 backward, fused 2 b and 4 b; both residual sums 12 b. Per number of the MLP:
    activation 5 b and 11 b, fused 3 b and 5 b. Per rotated number 5 b and 5 b, per number of query, key and value 2 b
    where their gradients are put together; fused 2 b and 2 b of all three. A weight's gradient: read, and added in
    float32.
    """
    width, total = NUMBER[plan.config.dtype], 0.0
    wide = 0 if program.fused_nodes else 1
    trains = stage == 2
    for name in role.names:
        arch, tokens = plan.architectures[name], microbatch.tokens[name]
        part = arch.hidden_size / (role.tp if plan.config.parallel.sequence_parallel else 1)
        groups = arch.kv_heads_of_rank(role.tp)
        heads = (arch.heads // role.tp + 2 * groups) * arch.head_dim
        rotated = heads - groups * arch.head_dim
        mlp = arch.ffn_size / role.tp
        once = 2 * part * (5 * width + 8 if wide else 2 * width) + 6 * width * part
        once += mlp * width * (5 if wide else 3) + width * (5 * rotated if wide else 2 * heads)
        back = 2 * part * (4 * width + 52 * wide) + 6 * width * part
        back += mlp * width * (11 if wide else 5) + width * (5 * rotated * wide + 2 * heads)
        again = _runs(plan, role, name, stage) - _BACK_AND_FORTH if trains else 0.0
        total += tokens * role.layers[name] * (once * (1 + again) + (back if trains else 0.0))
    weights = sum(role.matrices.values())
    if not trains:
        return {"elementwise": total, "gradients": 0.0}
    added = 2 * _WIDE if program.fused_weight_gradients else 2 * _WIDE + 2 * width
    return {"elementwise": total, "gradients": weights * float(added)}


def _moved_per_step(plan: RunPlan, role: Role, stage: int) -> float:
    """Gradients cleared (4); of a shard read for the norm and scaled (12), AdamW (reads 16, writes 12 + b)."""
    trained = role.parameters if stage == 2 else role.gate
    shards = plan.layout.dp if plan.config.parallel.distributed_optimizer and stage == 2 else 1
    return trained * (_WIDE + (12 + 28 + NUMBER[plan.config.dtype]) / shards)
