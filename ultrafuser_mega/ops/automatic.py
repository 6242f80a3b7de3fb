"""Which backend ``auto`` is: the one with fewest passes over the heads, unless a GPU has no room for its buffers."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ultrafuser_mega.ops.chunked import Needs, Plan
from ultrafuser_mega.ops.forward import buffer_budget, statistics_row_bytes
from ultrafuser_mega.ops.problem import Problem, trainable


def backend_for(problem: Problem, *, can_stream: bool) -> str:
    """gate_only, chunked or streaming. ``can_stream``: False where the caller wants what streaming has not."""
    return choose(problem, free_bytes(problem) if can_stream else None)


def choose(problem: Problem, free: int | None) -> str:
    """By the bytes of memory that are ``free``; None where there is no choice."""
    gate_trains = torch.is_grad_enabled() and problem.gate_logits.requires_grad
    backend = "gate_only" if gate_trains and not trainable(problem) else "chunked"
    return backend if free is None or planned_bytes(problem, backend) <= free else "streaming"


def planned_bytes(problem: Problem, backend: str) -> int:
    """What the backend will hold at once, gradients included, short of what there is one number of per row."""
    needs, apart = Needs.of(problem), backend == "gate_only"
    if apart or not needs.any:
        row_bytes = statistics_row_bytes(problem, apart, problem.hidden[0].element_size())
        return min(buffer_budget(problem.target.device), problem.rows * row_bytes)
    wanted = (needs.gate, *needs.hidden, *needs.heads)
    tensors = (problem.gate_logits, *problem.hidden, *problem.heads)
    gradients = sum(t.numel() * t.element_size() for t, want in zip(tensors, wanted, strict=True) if want)
    return gradients + Plan(problem).workspace_bytes(problem, needs)


def free_bytes(problem: Problem) -> int | None:
    """Of the GPU that the problem lies on, what the driver has and what PyTorch keeps for reuse. None where streaming
    cannot take over: off a GPU, in fp64, in a graph that is compiled or captured, on tensors without data; and under a
    group, whose ranks would have to agree. The driver is asked once, by the host; the device is not waited for."""
    first, device = problem.hidden[0], problem.target.device
    if not first.is_cuda or first.dtype == torch.float64 or problem.settings.group is not None:
        return None
    if torch.compiler.is_compiling() or isinstance(first, FakeTensor) or torch.cuda.is_current_stream_capturing():
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
