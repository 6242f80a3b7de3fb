"""What the planning's arithmetic says of the very microbatches that a dry run ran."""

from __future__ import annotations

from ultrafuser_mega.planning.cost import rank_cost
from ultrafuser_mega.planning.loss_memory import Device
from ultrafuser_mega.planning.microbatch import Microbatch
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.reporting.rehearsal import Predicted, Rehearsal


def predictions(plan: RunPlan, rehearsal: Rehearsal, device: Device) -> dict[tuple[int, str], Predicted]:
    """(rank, part) -> prediction, for the stages and the checkpoint at the end of them."""
    found = {}
    for part in rehearsal.parts:
        if not part.microbatches:
            continue
        costs = [
            rank_cost(
                plan,
                rehearsal.rank,
                Microbatch(
                    {name: sum(lengths) for name, lengths in batch.lengths.items()},
                    batch.rows,
                    {name: sum(length**2 for length in lengths) for name, lengths in batch.lengths.items()},
                ),
                stage=int(part.name.removeprefix("stage ")),
                microbatches=len(part.microbatches),
                device=device,
            )
            for batch in part.microbatches
        ]
        memory = max((cost.memory for cost in costs), key=lambda memory: memory.phases["backward"])
        flops = sum(sum(cost.products.values()) for cost in costs)
        found[rehearsal.rank, part.name] = Predicted(memory.phases["backward"], flops)
        found[rehearsal.rank, "checkpoint"] = Predicted(memory.phases["save"], 0.0)
    return found
