"""What each stage trains, part by part: the gate, all heads, and each specialist without its head.

By default stage 1 trains the gate alone and stage 2 everything in full; ``stage1.train`` and ``stage2.train`` say what
is otherwise. A part's rates are the stage's where it names none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ultrafuser_mega.config.stages import Mode, Optimizer, Part, Stage, Stage2
from ultrafuser_mega.errors import InputError

GATE, HEADS, SPECIALISTS = "gate", "heads", "specialists"


@dataclass(frozen=True)
class TrainedPart:
    """A part in a stage.

    Attributes:
        name: "gate", "heads" or a specialist's.
        mode: how it trains.
        rates: the stage with this part's rates.
        weight_decay: of its matrices.
    """

    name: str
    mode: Mode
    rates: Stage
    weight_decay: float

    @property
    def trains(self) -> bool:
        """Whether anything of it moves."""
        return self.mode != "frozen"


def in_words(parts: Mapping[str, TrainedPart]) -> str:
    """What trains, for a title: "gate only", "everything", "gate, heads, adapters of text, code"."""
    full = [name for name, part in parts.items() if part.mode == "full"]
    adapted = [name for name, part in parts.items() if part.mode == "lora"]
    if len(full) == len(parts):
        return "everything"
    words = [*full, *([f"adapters of {', '.join(adapted)}"] if adapted else [])]
    return f"{words[0]} only" if len(words) == 1 else ", ".join(words)


def check_parts(stages: Mapping[int, Stage], optimizer: Optimizer, specialists: Sequence[str]) -> None:
    """Refuse what cannot be trained so.

    Raises:
        InputError: a part that is none, adapters of what has none, rates of what is frozen, a specialist that changes
            between adapters and full training, or a stage that trains nothing; names the key.
    """
    found = {number: stage_parts(stage, number, optimizer, specialists) for number, stage in stages.items()}
    for number, stage in stages.items():
        known = (GATE, HEADS, SPECIALISTS, *specialists)
        gate = stage.train.get(GATE)
        if isinstance(stage, Stage2) and stage.gate_lr and gate and gate.lr not in (None, stage.gate_lr):
            raise InputError(f"stage2.gate_lr: {stage.gate_lr:g}, and stage2.train.gate.lr: {gate.lr:g}; leave one out")
        for name, part in stage.train.items():
            key = f"stage{number}.train.{name}"
            if name not in known:
                raise InputError(f"{key}: there is no such part; use {', '.join(known)}")
            if name in (GATE, HEADS) and part.mode == "lora":
                raise InputError(f"{key}: adapters are of specialists' projections; use frozen or full")
            rates = part.model_dump(exclude={"mode"}, exclude_none=True)
            whole = specialists if name == SPECIALISTS else [name]
            if rates and not any(found[number][one].trains for one in whole):
                raise InputError(
                    f"{key}: is frozen, and {', '.join(rates)} would do nothing; set its mode, or leave it out"
                )
            if name in specialists and name in (GATE, HEADS, SPECIALISTS):
                raise InputError(f"{key}: a specialist has the name of a part; give it another one")
        if stage.steps and not any(part.trains for part in found[number].values()):
            raise InputError(f"stage{number}.train: everything is frozen; train a part, or set stage{number}.steps=0")
        for one in found[number].values():
            if one.trains and stage.steps:
                one.rates.check_schedule(f"stage{number}.train.{one.name}")
    for name in specialists:
        modes = {number: found[number][name].mode for number, stage in stages.items() if stage.steps}
        if {"lora", "full"} <= set(modes.values()):
            full = next(number for number, mode in modes.items() if mode == "full")
            raise InputError(
                f"stage{full}.train.{name}: full, where the other stage trains its adapters; "
                f"use lora or frozen, or two runs: export merges adapters, checkpoint.start begins with the result"
            )


def stage_parts(stage: Stage, number: int, optimizer: Optimizer, specialists: Sequence[str]) -> dict[str, TrainedPart]:
    """Name -> part, of all parts in the order gate, heads, specialists; those that are frozen too."""
    found = {}
    for name in (GATE, HEADS, *specialists):
        own = stage.train.get(name) or (stage.train.get(SPECIALISTS) if name not in (GATE, HEADS) else None) or Part()
        default: Mode = "full" if number == 2 or name == GATE else "frozen"
        lr, min_lr = own.lr, own.min_lr
        if lr is None and name == GATE and isinstance(stage, Stage2):
            lr = stage.gate_lr
        if min_lr is None and lr is not None:
            min_lr = stage.min_lr * lr / stage.lr
        of_its_own = {
            "lr": lr,
            "min_lr": min_lr,
            "warmup_steps": own.warmup_steps,
            "schedule": own.schedule,
        }
        rates = stage.model_copy(update={key: value for key, value in of_its_own.items() if value is not None})
        if own.schedule == "constant" and own.min_lr is None:
            rates = rates.model_copy(update={"min_lr": 0.0})
        decay = optimizer.weight_decay if own.weight_decay is None else own.weight_decay
        found[name] = TrainedPart(name, own.mode or default, rates, decay)
    return found
