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

Of a distillation's heads 2 N V D, 4 N V d more for the student's; of its gate 2 N d u n.

A frozen specialist: 2 T W and 4 h e sum s^2 / t; where the gate alone trains 2 N V D and 4 N d u n. Adapters spare the
2 T W of weights' gradients and add 6 T R (inputs + outputs) of each linear map, R the ranks beside it.

Collectives (bytes of the whole tensor: an all-gather's result, a reduce-scatter's operand), per layer and microbatch of
stage 2, b T d each: with sequence parallelism 6 all-gathers and 4 reduce-scatters (forward 2 and 2, backward 4 and 2),
without it 4 all-reduces; 2 and 2, or 2, more where recomputed. Beside the layers the embedding's and the final gather,
the exchange's gather of complete gradients, and once a step the norms' gradients (float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser_mega.config import GATE, HEADS
from ultrafuser_mega.planning.loss_memory import STUDENT_STATISTICS, Device, exchange_numbers, in_planes
from ultrafuser_mega.planning.memory import RankMemory, rank_memory, recomputed_layers
from ultrafuser_mega.planning.microbatch import Microbatch
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import Role, role_of
from ultrafuser_mega.planning.trained import NUMBER, WIDE, Trains

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
        from_host: bytes of the optimizer that come from the host's memory in a step, and go back.
        read: bytes of weights that the products of a microbatch read at the least.
        layers: decoder layers that the rank runs forward and backward; recomputed ones a third more.
        tensors: of parameters.
    """

    memory: RankMemory
    products: dict[str, float]
    traffic: tuple[Traffic, ...]
    moved: dict[str, float]
    moved_per_step: float
    from_host: float
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
    largest, trains = fullest or microbatch, Trains.of(plan.config, stage)
    memory = rank_memory(plan, rank, largest, stage=stage, microbatches=microbatches, device=device)
    return RankCost(
        memory=memory,
        products=_products(plan, role, microbatch, trains, device),
        traffic=tuple(_traffic(plan, role, rank, microbatch, trains, device)),
        moved=_moved(plan, role, microbatch, trains, program),
        moved_per_step=_moved_per_step(plan, role, trains),
        from_host=memory.host,
        read=NUMBER[plan.config.dtype]
        * sum((_passes(trains, name) if trains.backward(name) else 1) * role.matrices[name] for name in role.names),
        layers=sum(_runs(plan, role, name, trains) * layers / 3 for name, layers in role.layers.items()),
        tensors=trains.tensors(role),
    )


def _passes(trains: Trains, name: str) -> int:
    """Products of a linear map that trains, forward and backward: without its weight's gradient one less."""
    return _BACK_AND_FORTH if trains.whole(name) else _BACK_AND_FORTH - 1


def _runs(plan: RunPlan, role: Role, name: str, trains: Trains) -> float:
    """Forward passes that the products of a layer amount to, on the average of the rank's layers."""
    if not trains.backward(name):
        return 1.0
    return _passes(trains, name) + recomputed_layers(plan, role.layers[name]) / role.layers[name]


def _products(plan: RunPlan, role: Role, microbatch: Microbatch, trains: Trains, device: Device) -> dict[str, float]:
    layers = attention = 0.0
    for name in role.names:
        arch = plan.architectures[name]
        tokens, again = microbatch.tokens[name], 0.0
        if trains.backward(name):
            again = recomputed_layers(plan, role.layers[name]) / role.layers[name]
        layers += 2 * _runs(plan, role, name, trains) * tokens * role.matrices[name]
        beside = _BACK_AND_FORTH + again if trains.backward(name) else 1.0
        layers += 2 * beside * tokens * role.adapter_products.get(name, 0)
        if role.is_first and trains.backward(name) and not trains.whole(name) and not again:
            layers -= 2 * tokens * _first_map(plan, role, name)
        scores = 4 * arch.heads * arch.head_dim / role.tp * microbatch.squares[name] * role.layers[name]
        attention += scores * (1 + again + (2.5 if trains.backward(name) else 0))  # backward: 2.5 forwards
    head, gate = _loss_products(plan, role, microbatch, trains, device)
    return {
        "layers": layers,
        "attention": attention,
        "head": head * microbatch.rows * len(role.vocabulary or ()),
        "gate": gate * microbatch.rows * role.gate_units,
    }


def _loss_products(
    plan: RunPlan, role: Role, microbatch: Microbatch, trains: Trains, device: Device
) -> tuple[float, float]:
    """FLOPs of the loss: for a row and vocabulary row of the heads, for a row and unit of the gate."""
    widths = {name: arch.hidden_size for name, arch in plan.architectures.items()}
    total, student = sum(widths.values()), plan.config.student
    if student is not None:
        own = widths[student]
        return 2 * total + 2 * own * (trains.whole(HEADS) + trains.backward(student)), 2 * (total - own)
    to_states = sum(width for name, width in widths.items() if trains.backward(name))
    back = 0 if trains.gate_alone else to_states  # from logits
    planes = in_planes(plan, role, microbatch.rows, device)
    if not trains.gate_alone and (trains.states or trains.whole(GATE)) and not planes:
        back = total  # the gate's gradient is made of them
    head = (2 + 2 * trains.whole(HEADS)) * total + 2 * back
    return head, (2 + 2 * trains.whole(GATE)) * total + 2 * to_states


def _first_map(plan: RunPlan, role: Role, name: str) -> float:
    """Numbers of the first layer's first map and its adapters' A: nobody needs the gradient of a frozen embedding."""
    arch, lora = plan.architectures[name], plan.config.adapters[name]
    heads = arch.heads // role.tp + 2 * arch.kv_heads_of_rank(role.tp)
    adapted = sum(target in lora.targets for target in ("q_proj", "k_proj", "v_proj"))
    parts = role.tp if plan.config.parallel.sequence_parallel else 1
    return arch.hidden_size * (heads * arch.head_dim + adapted * lora.rank / parts)


def _traffic(
    plan: RunPlan, role: Role, rank: int, microbatch: Microbatch, parts: Trains, device: Device
) -> Sequence[Traffic]:
    width, layout = NUMBER[plan.config.dtype], plan.layout
    sequence = plan.config.parallel.sequence_parallel and role.tp > 1
    trains = any(parts.backward(name) for name in role.names)
    found: list[Traffic] = []
    states = {name: width * microbatch.tokens[name] * plan.architectures[name].hidden_size for name in role.names}
    if role.tp > 1:
        group = _group_of(layout.tensor_groups(role.names[0]), rank)
        calls, nbytes = 0, 0.0
        for name in role.names:
            own_trains = parts.backward(name)
            again = recomputed_layers(plan, role.layers[name]) if own_trains else 0
            found += _of_layers(plan, role, name, group, states[name], microbatch.tokens[name], again, own_trains)
            # The embedding's sum and, with sequence parallelism, its gradient's gather and the last hidden states'.
            own = role.is_first * (1 + (sequence and parts.whole(name))) + (role.is_last and sequence)
            calls, nbytes = calls + own, nbytes + own * states[name]
        found.append(Traffic("tp", group, calls, nbytes, 1 if sequence else 2))
        if role.is_last and trains:
            own_rows = width * microbatch.rows * sum(plan.architectures[name].hidden_size for name in role.names)
            found.append(Traffic("tp", group, len(role.names), own_rows))
        if sequence and trains:
            found.append(Traffic("tp", group, 1, WIDE * role.norms, 2, per_step=True))
    if role.fusion > 1:
        group = _group_of(layout.fusion_groups(), rank)
        numbers = exchange_numbers(plan, role, microbatch.rows)
        rows = microbatch.rows * WIDE
        if layout.kind == "disjoint":
            found.append(Traffic("fusion", group, 1, numbers * width))
        if parts.states:
            found.append(Traffic("fusion", group, 1, WIDE * exchange_numbers(plan, role, microbatch.rows, parts)))
        # The gate's gradient: part of the statistics, or summed up from what the chunked loss makes of the products.
        # A frozen gate beside a student has none.
        learns = plan.config.student is not None
        mixed = not learns and not parts.gate_alone and not in_planes(plan, role, microbatch.rows, device)
        columns = _STATISTICS + (0 if mixed else 3 * len(plan.architectures))
        if learns:
            columns = STUDENT_STATISTICS
        found.append(Traffic("fusion", group, 1, rows * columns * role.fusion))
        found.append(Traffic("fusion", group, 1 + mixed, (1 + mixed) * rows * len(plan.config.fused), 2))
    if role.pp > 1:
        group = _group_of(layout.pipeline_groups(role.names[0]), rank)
        ways = (not role.is_first) + (not role.is_last)
        handed = sum(states.values()) / (role.tp if sequence else 1)
        found.append(Traffic("pp", group, ways * (1 + trains), ways * (1 + trains) * handed))
    if layout.dp > 1:
        group = _group_of(layout.data_groups(), rank)
        trained = parts.parameters(role)
        if parts.shards(plan) > 1:
            found.append(Traffic("dp", group, 1, WIDE * trained, per_step=True))
            found.append(Traffic("dp", group, 1, width * trained, per_step=True))
        else:
            found.append(Traffic("dp", group, 1, WIDE * trained, 2, per_step=True))
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


def _moved(plan: RunPlan, role: Role, microbatch: Microbatch, parts: Trains, program: Program) -> dict[str, float]:
    """Bytes through memory of what is no product.

    Per number of a hidden state's part, in bytes, each operation reading and writing once (norms go through float32):
    a norm 5 b + 8 forward and 4 b + 52 backward, fused 2 b and 4 b; both residual sums 12 b. Per number of the MLP:
    activation 5 b and 11 b, fused 3 b and 5 b. Per rotated number 5 b and 5 b, per number of query, key and value 2 b
    where their gradients are put together; fused 2 b and 2 b of all three. A weight's gradient: read, and added in
    float32.
    """
    width, total = NUMBER[plan.config.dtype], 0.0
    wide = 0 if program.fused_nodes else 1
    for name in role.names:
        trains = parts.backward(name)
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
        again = recomputed_layers(plan, role.layers[name]) / role.layers[name] if trains else 0.0
        total += tokens * role.layers[name] * (once * (1 + again) + (back if trains else 0.0))
    weights = sum(role.matrices[name] for name in role.names if parts.whole(name))
    weights += sum(role.adapters[name] for name in role.adapters if parts.modes[name] == "lora")
    added = 2 * WIDE if program.fused_weight_gradients else 2 * WIDE + 2 * width
    return {"elementwise": total, "gradients": weights * float(added)}


def _moved_per_step(plan: RunPlan, role: Role, trains: Trains) -> float:
    """Gradients cleared (4); of a shard read for the norm and scaled (12), AdamW (reads 16, writes 12 + b)."""
    trained, shards = trains.parameters(role), trains.shards(plan)
    return trained * (WIDE + (12 + 28 + NUMBER[plan.config.dtype]) / shards)
