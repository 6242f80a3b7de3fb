"""What a rank's memory holds, by kind, and when it holds most: arithmetic from the plan alone.

Symbols, for one specialist on one rank: T tokens of the microbatch, d hidden size, f MLP width, h query and g key/value
heads of e numbers each, t tensor-parallel ranks, s = t under sequence parallelism, else 1; b bytes of a number; N
response tokens, D = sum of all specialists' d, V vocabulary rows of the rank.

Per parameter: its weight (b) and, where it trains, a float32 gradient, two float32 AdamW moments and under bf16 a
float32 weight, the last three sharded over replicas by the distributed optimizer. AdamW's update needs nothing besides,
but two blocks of these three where they lie in the host's memory.

Per token of a layer autograd keeps, by the operation that needs it:

    b d / s               the input of the first norm, which is the layer's; + 4 / s: its reciprocal root mean square
    b d / s               the norm's output, the query, key and value projection's input
    b (h + 2 g) e / t     rotated queries, rotated keys, values
    b (h + 2 g) e / t     what they were made of, where queries and keys are normed; + 4 (h + g) / t
    b h e / t             what attention gives, the output projection's input; + 4 h / t: log-sum-exp of every score row
    b h e / t             the same once more where attention runs sequence by sequence (CPU, float32)
    2 b d / s + 4 / s     as above, of the MLP's norm
    3 b f / t             both halves of the activation's input, and its output

A recomputed layer keeps b d / s, its input. Where every layer is, the one in work holds all of the above for itself.

Of a specialist that is frozen nothing is kept. One that trains by adapters keeps as much, but the input of a linear map
only for an adapter beside it, where nothing else needs it (a norm's output); and b R for each, R its adapters' ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser_mega.models.families import FAMILIES
from ultrafuser_mega.models.hf_folder import Architecture
from ultrafuser_mega.models.lora import linear_maps
from ultrafuser_mega.models.pipeline import stage_layers
from ultrafuser_mega.planning.loss_memory import Device, loss_bytes
from ultrafuser_mega.planning.microbatch import Microbatch, workload_of
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import Role, role_of
from ultrafuser_mega.planning.trained import NUMBER, OPTIMIZER, WIDE, Trains
from ultrafuser_mega.reporting.plan_table import RankShare
from ultrafuser_mega.runtime.host_states import BLOCK, SLOTS

_INDEX = 8  # of int64


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank.

    Attributes:
        weights: of all that it holds, embeddings and heads among them.
        gradients: the float32 buffer.
        optimizer: moments, and float32 weights under bf16, but for those in the host's memory.
        buffers: scratch space that stays from the first step on.
        activations: what autograd keeps of all microbatches in flight, at its fullest.
        loss: rows of hidden states, gate, logits, and the gradients of heads and rows while they are on their way.
        workspace: gradients and temporaries of one layer's backward, which comes when the loss is through.
        save: what writing a checkpoint takes beside weights, gradients and optimizer.
        update: what the optimizer takes beside them.
        host: of the host's memory, what lies there of the optimizer.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    workspace: float = 0.0
    save: float = 0.0
    update: float = 0.0
    host: float = 0.0

    @property
    def static(self) -> float:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def kinds(self) -> dict[str, float]:
        """By kind, as people read it."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations + self.buffers,
            "loss": self.loss,
        }

    @property
    def phases(self) -> dict[str, float]:
        """The most that each phase of a step holds."""
        passes = self.activations + max(self.loss, self.workspace)
        more = {"backward": passes, "update": self.update, "save": self.save}
        return {phase: self.static + self.buffers + held for phase, held in more.items()}

    @property
    def peak(self) -> float:
        """The most that is held at any time."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """When that is."""
        return max(self.phases, key=self.phases.__getitem__)


def rank_shares(plan: RunPlan, device: Device = "cuda") -> list[RankShare]:
    """Each rank of the first replica, with the fullest microbatch of the run's data; the others hold the same."""
    fullest = {
        number: workload_of(plan.config, stage.samples_per_class).fullest(plan.layout.dp)
        for number, stage in plan.config.stages.items()
    }
    shares = []
    for rank in range(plan.layout.replica_size):
        role = role_of(plan, rank)
        held = {
            number: rank_memory(plan, rank, batch, stage=number, device=device) for number, batch in fullest.items()
        }
        share = RankShare(
            rank=rank,
            specialists=role.names,
            tensor=(role.tensor_rank, role.tp),
            stage=(role.stage, role.pp),
            vocabulary_rows=role.vocabulary,
            parameters=role.parameters,
            kinds={number: memory.kinds for number, memory in held.items()},
            peaks={number: (memory.phase, memory.peak) for number, memory in held.items()},
            host={number: memory.host for number, memory in held.items()},
        )
        shares.append(share)
    return shares


def rank_memory(
    plan: RunPlan,
    rank: int,
    microbatch: Microbatch,
    *,
    stage: int = 2,
    microbatches: int | None = None,
    device: Device = "cuda",
) -> RankMemory:
    """Memory of ``rank`` in training stage 1 or 2.

    Args:
        plan: resolved; only its configuration, architectures and layout count.
        rank: of the first replica; all replicas hold the same.
        microbatch: the largest of a step.
        stage: of training.
        microbatches: of a step, where they may be fewer than a pipeline holds in flight.
        device: whose kernels run.
    """
    role = role_of(plan, rank)
    config, width = plan.config, NUMBER[plan.config.dtype]
    trains = Trains.of(config, stage)
    trained, state = trains.parameters(role), trains.state(plan, role)
    host = state if config.optimizer.state == "host" and device == "cuda" else 0.0
    held = {
        "weights": float(role.parameters * width),
        "gradients": float(trained * WIDE),
        "optimizer": state - host,
        "host": host,
        "update": min(SLOTS * BLOCK, SLOTS * host),
    }
    frozen = [name for name in role.names if not trains.backward(name)]
    forward = max((_forward_workspace(plan, role, name, microbatch) for name in frozen), default=0.0)
    in_flight = min(role.pp - role.stage, microbatches or role.pp) if len(frozen) < len(role.names) else 1
    kept = kept_activations(plan, role, microbatch, device, trains)
    return RankMemory(
        **held,
        buffers=_scratch(plan, role, microbatch),
        activations=in_flight * (kept + _batch(plan, role, microbatch)),
        loss=loss_bytes(plan, role, microbatch, device, trains),
        workspace=max(forward, _backward_workspace(plan, role, microbatch, device, trains)),
        save=_copied(plan, role, trained, device) if trains.beside_gate else 0.0,
    )


def _copied(plan: RunPlan, role: Role, trained: int, device: Device) -> float:
    """What a save copies to host memory, where that is the device's: this replica's share of what all ranks write."""
    if device != "cpu":
        return 0.0
    dtype = plan.config.dtype
    return (role.parameters * NUMBER[dtype] + trained * float(OPTIMIZER[dtype])) / plan.layout.dp


def kept_activations(plan: RunPlan, role: Role, microbatch: Microbatch, device: Device, trains: Trains) -> float:
    """Bytes that the layers' backward needs of the forward of one microbatch, and of what stages hand each other."""
    width, total = NUMBER[plan.config.dtype], 0.0
    for name in role.names:
        arch, tokens = plan.architectures[name], microbatch.tokens[name]
        if not trains.backward(name):
            continue
        part = width * arch.hidden_size / _sequence_parts(plan, role)  # of a hidden state per token
        recomputed = recomputed_layers(plan, role.layers[name])
        layer = layer_bytes(plan, role, arch, device)
        if not trains.whole(name):
            layer += _beside_adapters(plan, role, name)
        total += tokens * (role.layers[name] - recomputed) * layer
        total += tokens * recomputed * part
        if role.is_last:
            total += tokens * (part + WIDE / _sequence_parts(plan, role))  # the final norm
        else:
            total += tokens * part  # what the next stage was sent
        if role.is_first and role.tp > 1:
            total += tokens * (_INDEX + 1)  # ids within the rank's rows of the embedding, and which are not
    return total


def layer_bytes(plan: RunPlan, role: Role, arch: Architecture, device: Device) -> float:
    """Bytes per token that autograd keeps of a layer that is not recomputed: the table at the head of this file."""
    width, parts, tp = NUMBER[plan.config.dtype], _sequence_parts(plan, role), role.tp
    queries, groups = arch.heads // tp, arch.kv_heads_of_rank(tp)
    numbers = 4 * arch.hidden_size / parts + 3 * arch.ffn_size / tp
    attended = 2 if device == "cpu" or plan.config.dtype == "fp32" else 1
    normed = FAMILIES[arch.family].qk_norm
    numbers += ((1 + normed) * (queries + 2 * groups) + attended * queries) * arch.head_dim
    statistics = 2 / parts + queries + normed * (queries + groups)
    return width * numbers + WIDE * statistics


def _beside_adapters(plan: RunPlan, role: Role, name: str) -> float:
    """What adapters keep per token of a layer, less the outputs of norms that no adapter takes in."""
    arch, lora = plan.architectures[name], plan.config.adapters[name]
    width, parts, numbers = NUMBER[plan.config.dtype], _sequence_parts(plan, role), 0.0
    for one in linear_maps(arch, role.tensor_rank, role.tp):
        adapted = sum(part.name in lora.targets for part in one.projections)
        numbers += adapted * lora.rank / (parts if one.to_hidden else 1)
        if not adapted and not one.to_hidden:
            numbers -= arch.hidden_size / parts
        if not adapted and one.path.endswith("fc2"):
            numbers -= arch.ffn_size / role.tp
    return width * numbers


def recomputed_layers(plan: RunPlan, layers: int) -> int:
    """Of a stage's ``layers`` those that the backward computes anew."""
    wanted = plan.config.parallel.recompute_layers
    return layers if wanted == "all" else min(wanted, layers)


def most_layers(plan: RunPlan) -> int:
    """Layers of the longest pipeline stage of any specialist."""
    return max(
        max(stage_layers(arch.layers, plan.layout.placements[name].pp)) for name, arch in plan.architectures.items()
    )


def _sequence_parts(plan: RunPlan, role: Role) -> int:
    return role.tp if plan.config.parallel.sequence_parallel else 1


def _batch(plan: RunPlan, role: Role, microbatch: Microbatch) -> float:
    """Ids, positions and their cosines and sines, and rows, of the rank's specialists; targets and classes."""
    total = microbatch.rows * _INDEX * (len(role.names) + 2)
    for name in role.names:
        total += microbatch.tokens[name] * (2 * _INDEX + NUMBER[plan.config.dtype] * plan.architectures[name].head_dim)
    return total


def _scratch(plan: RunPlan, role: Role, microbatch: Microbatch) -> float:
    """Megatron's one buffer for gathered inputs of linear maps under sequence parallelism."""
    if _sequence_parts(plan, role) == 1:
        return 0.0
    sizes = [microbatch.tokens[name] * plan.architectures[name].hidden_size for name in role.names]
    return NUMBER[plan.config.dtype] * max(sizes)


def _backward_workspace(plan: RunPlan, role: Role, microbatch: Microbatch, device: Device, trains: Trains) -> float:
    """The largest that lies beside kept activations while one layer goes backward.

    Of its steps: the second linear map of the MLP, the activation, the first linear map, a norm. A weight's gradient in
    the weight's type lives until it is added to the buffer. Other specialists' gradients wait.
    """
    width, largest, waiting = NUMBER[plan.config.dtype], 0.0, 0.0
    for name in role.names:
        if not trains.backward(name):
            continue
        whole = 1 if trains.whole(name) else 0  # a frozen weight's gradient is not made
        arch, tokens = plan.architectures[name], microbatch.tokens[name]
        hidden, mlp = arch.hidden_size, arch.ffn_size / role.tp
        part = hidden / _sequence_parts(plan, role)
        steps = (
            tokens * (hidden + mlp) + whole * hidden * mlp,
            5 * tokens * mlp,
            tokens * (2 * mlp + hidden + part) + whole * 2 * hidden * mlp,
            tokens * part * (2 + 4 * WIDE / width),
        )
        own = width * (max(steps) + tokens * part)
        if recomputed_layers(plan, role.layers[name]) == role.layers[name]:
            own += tokens * layer_bytes(plan, role, arch, device)
        largest = max(largest, own)
        waiting += width * (microbatch.rows * hidden if role.is_last else tokens * part)
    return largest + waiting


def _forward_workspace(plan: RunPlan, role: Role, name: str, microbatch: Microbatch) -> float:
    """The most that one layer takes where nothing is kept: around the MLP's activation."""
    arch, width = plan.architectures[name], NUMBER[plan.config.dtype]
    hidden = arch.hidden_size * (1 + 2 / _sequence_parts(plan, role))
    return width * microbatch.tokens[name] * (hidden + 4 * arch.ffn_size / role.tp)
