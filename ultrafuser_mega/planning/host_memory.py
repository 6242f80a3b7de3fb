"""What ``optimizer.state: host`` takes of a node's memory; arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import distinct_ranks, role_of
from ultrafuser_mega.planning.trained import NUMBER, Trains
from ultrafuser_mega.reporting.plan_table import size


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the host's memory, for the rank that takes most.

    state: of the optimizer, for as long as the stage takes.
    save: of what a checkpoint copies before it is written.
    """

    state: float
    save: float

    def in_words(self, ranks: int) -> str:
        """For so many ranks of a node."""
        each = f"{size(self.state)} of host memory a rank, {size(ranks * self.state)} for {ranks} of a node"
        return f"optimizer.state: host takes {each}; {size(ranks * self.save)} more while a checkpoint is written"


def host_memory(plan: RunPlan) -> HostMemory | None:
    """Of the stage that takes most; None where optimizers keep what they hold on the device, or nothing trains."""
    config, found = plan.config, []
    if config.optimizer.state == "device":
        return None
    for stage in config.stages:
        trains = Trains.of(config, stage)
        for role in (role_of(plan, rank) for rank in distinct_ranks(plan)):
            kept = trains.parameters(role) if config.checkpoint.weights == "trained" else role.parameters
            state = trains.state(plan, role)
            copies = (kept * NUMBER[config.dtype] + state * trains.shards(plan)) / plan.layout.dp
            found.append(HostMemory(state, copies))
    return max(found, key=lambda one: one.state + one.save, default=None)


def check_host_memory(plan: RunPlan, ranks: int, free: float) -> None:
    """Refuse a run that this machine's memory is too small for.

    Args:
        plan: of the run, on GPUs.
        ranks: of it on this machine.
        free: bytes that it has left.

    Raises:
        InputError: what is needed and what is there.
    """
    needed = host_memory(plan)
    if needed is not None and ranks * (needed.state + needed.save) > free:
        raise InputError(
            f"{needed.in_words(ranks)}, and {size(free)} of this machine are free; "
            "take more nodes, fewer ranks a node, or optimizer.state=device"
        )
