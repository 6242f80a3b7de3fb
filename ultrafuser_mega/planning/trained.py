"""What a stage trains of a rank's share, and what that takes: parameters, gradients, optimizer; arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser_mega.config import GATE, HEADS, FuserConfig
from ultrafuser_mega.config.stages import Mode
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import Role, role_of
from ultrafuser_mega.reporting.parts_table import PartShare

WIDE = 4  # bytes of float32
NUMBER = {"fp32": 4, "bf16": 2}  # bytes of a weight and of a hidden state's number
OPTIMIZER = {"fp32": 8, "bf16": 12}  # bytes of AdamW's moments, and of a float32 weight where the weight is narrower


@dataclass(frozen=True)
class Trains:
    """How a stage trains the parts: name -> mode, of gate, heads and all specialists."""

    modes: dict[str, Mode]

    @classmethod
    def of(cls, config: FuserConfig, stage: int) -> Trains:
        """Those of stage 1 or 2."""
        return cls({name: part.mode for name, part in config.parts(stage).items()})

    def whole(self, name: str) -> bool:
        """Whether a part trains in full."""
        return self.modes[name] == "full"

    def backward(self, name: str) -> bool:
        """Whether a specialist has a backward."""
        return self.modes[name] != "frozen"

    @property
    def beside_gate(self) -> bool:
        """Whether anything but the gate trains."""
        return any(mode != "frozen" for name, mode in self.modes.items() if name != GATE)

    @property
    def states(self) -> bool:
        """Whether any specialist's hidden states get gradients."""
        return any(mode != "frozen" for name, mode in self.modes.items() if name not in (GATE, HEADS))

    @property
    def gate_alone(self) -> bool:
        """Whether the loss needs one pass over the vocabulary."""
        return self.whole(GATE) and not self.beside_gate

    def parameters(self, role: Role) -> int:
        """Trained ones of a rank."""
        return sum(self.by_part(role).values())

    def by_part(self, role: Role) -> dict[str, int]:
        """The same by part; 0 for frozen ones."""
        counts = {"full": role.parts | {HEADS: role.own_heads}, "lora": role.adapters}
        return {name: counts[mode].get(name, 0) if mode != "frozen" else 0 for name, mode in self.modes.items()}

    def shards(self, plan: RunPlan) -> int:
        """Replicas that share the optimizer's state out among them."""
        return plan.layout.dp if plan.config.parallel.distributed_optimizer and self.beside_gate else 1

    def state(self, plan: RunPlan, role: Role) -> float:
        """Bytes of what a rank's optimizer holds, wherever that lies."""
        return self.parameters(role) * OPTIMIZER[plan.config.dtype] / self.shards(plan)

    def tensors(self, role: Role) -> int:
        """Trained tensors of a rank, about: as many as the trained parts are of the whole."""
        if self.gate_alone:
            return 3
        whole = sum(role.parts.get(name, 0) for name in self.modes if self.whole(name))
        held = sum(role.parts.values()) or 1
        return round(role.tensors * whole / held) + sum(
            role.adapter_tensors[name] for name, mode in self.modes.items() if mode == "lora" and name in role.adapters
        )


def part_shares(plan: RunPlan, stage: int) -> list[PartShare]:
    """Every part of the model in a stage, on all ranks of a replica together; what ranks hold copies of counts anew."""
    trains, parts, dtype = Trains.of(plan.config, stage), plan.config.parts(stage), plan.config.dtype
    roles = [role_of(plan, rank) for rank in range(plan.layout.replica_size)]
    found = []
    for name, part in parts.items():
        held = sum(role.parts.get(name, 0) + role.adapters.get(name, 0) for role in roles)
        trained = sum(trains.by_part(role)[name] for role in roles)
        share = PartShare(
            name=name,
            mode=part.mode,
            parameters=held,
            trained=trained,
            weights=held * float(NUMBER[dtype]),
            gradients=trained * float(WIDE),
            optimizer=trained * float(OPTIMIZER[dtype]),
            lr=part.rates.lr,
            weight_decay=part.weight_decay,
        )
        found.append(share)
    return found
