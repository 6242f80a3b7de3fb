"""Time and peak memory of the mixture cross-entropy beside what else computes it, interleaved in one run.

A task is what one wants of the loss; a variant is one way to get it. Every task has a floor: the bare matrix products
that no exact implementation can avoid, measured in the same rounds, so that ratios survive a machine whose clock
drifts. This file measures; bench_mixture_ce.py prints, plots and stores.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers import concatenated, concatenated_loss, plain_loss
from torch import Tensor

from ultrafuser_mega.ops.loss import mixture_cross_entropy

TASKS = {  # task: (needs gate, hidden, heads), GEMM passes of the floor
    "forward": ((False, False, False), 1),
    "gate_only": ((True, False, False), 1),
    "train": ((True, True, True), 3),
}
FLOOR = "bare GEMMs"
PLAIN, ONE_GEMM = "plain PyTorch", "one GEMM"  # the two peers of which every table shows the ratio
# of a mean over many tokens: 16-bit logits are off by up to 2^-8 (bf16) each, but not all in one direction
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocab: int
    widths: tuple[int, ...]
    dtype: torch.dtype

    def flops(self, passes: int) -> float:
        return 2.0 * passes * self.tokens * self.vocab * sum(self.widths)


@dataclass
class Result:
    task: str
    variant: str
    seconds: list[float] = field(default_factory=list)  # one per round
    cpu_seconds: list[float] = field(default_factory=list)  # of this process, all its threads
    peak_extra_bytes: int = 0  # most memory beyond what was held before the call, gradients included
    gradient_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Inputs:
    """One case on the device: random hidden states and heads whose logits look like a language model's.

    Under a group (``shard`` of ``shards``) the heads hold that shard's rows of the vocabulary, which may be none; all
    else is the same on every rank.
    """

    def __init__(self, shape: Shape, device: torch.device, shard: int = 0, shards: int = 1) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.shape, self.device, self.shards = shape, device, shards
        self.group = dist.group.WORLD if shards > 1 else None
        per_shard = -(-shape.vocab // shards)
        self.vocab_start = min(shard * per_shard, shape.vocab)
        held = min(per_shard, shape.vocab - self.vocab_start)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            values = torch.randn(rows, columns, generator=draw, device=device, dtype=torch.float32)
            return (values * scale).to(shape.dtype)

        self.hidden = [normal(shape.tokens, d, 1.0) for d in shape.widths]
        self.gate_logits = torch.randn(shape.tokens, len(shape.widths), generator=draw, device=device)
        self.target = torch.randint(0, shape.vocab, (shape.tokens,), generator=draw, device=device)
        draw.manual_seed(1 + shard)
        self.heads = [normal(held, d, 3.0 / d**0.5) for d in shape.widths]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.gate_logits, *self.hidden, *self.heads]

    def require(self, needs: tuple[bool, bool, bool]) -> int:
        """Say which gradients are wanted; returns their bytes."""
        gate, hidden, heads = needs
        self.gate_logits.requires_grad_(gate)
        for tensor in self.hidden:
            tensor.requires_grad_(hidden)
        for tensor in self.heads:
            tensor.requires_grad_(heads)
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors if tensor.requires_grad)

    def drop_gradients(self) -> None:
        for tensor in self.tensors:
            tensor.grad = None


Loss = Callable[[Inputs], Tensor]


def ours(backend: str) -> Loss:
    def loss(inputs: Inputs) -> Tensor:
        return mixture_cross_entropy(
            inputs.hidden,
            inputs.heads,
            inputs.gate_logits,
            inputs.target,
            group=inputs.group,
            vocab_start=inputs.vocab_start,
            vocab_size=inputs.shape.vocab,
            backend=backend,
        )

    return loss


def plain() -> Loss:
    """Plain PyTorch: n logit tensors, mixed, F.cross_entropy."""
    return _of_inputs(plain_loss)


def one_gemm() -> Loss:
    """Plain PyTorch of somebody cleverer: one product of concatenated, gate-scaled inputs and heads."""
    return _of_inputs(concatenated_loss)


def _of_inputs(function: Callable[..., Tensor]) -> Loss:
    def loss(inputs: Inputs) -> Tensor:
        return function(
            inputs.hidden,
            inputs.heads,
            inputs.gate_logits,
            inputs.target,
            vocab_size=inputs.shape.vocab,
            reduction="mean",
        )

    return loss


def compiled() -> Loss:
    """Plain PyTorch under torch.compile, for the inputs of one shape: call this anew for the next."""
    # What was compiled for other shapes counts towards a limit beyond which eager code runs in silence.
    torch.compiler.reset()

    def logits_to_loss(hidden: list[Tensor], heads: list[Tensor], gate_logits: Tensor, target: Tensor) -> Tensor:
        weights = torch.softmax(gate_logits, 1)
        z = sum(weights[:, j, None] * (states @ heads[j].t()) for j, states in enumerate(hidden))
        assert isinstance(z, Tensor)
        return F.cross_entropy(z, target)

    function = torch.compile(logits_to_loss, fullgraph=True)  # raises rather than run anything eagerly
    return lambda inputs: function(inputs.hidden, inputs.heads, inputs.gate_logits, inputs.target)


def liger() -> Loss:
    function = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def loss(inputs: Inputs) -> Tensor:
        x, head = concatenated(inputs.hidden, inputs.heads, inputs.gate_logits)
        return cast(Tensor, function(head, x, inputs.target))

    return loss


def cut_cross_entropy() -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(inputs: Inputs) -> Tensor:
        x, head = concatenated(inputs.hidden, inputs.heads, inputs.gate_logits)
        return cast(Tensor, function(x, head, inputs.target))

    return loss


def megatron() -> Loss:
    """Megatron-LM's way: the mixed logits in memory, then its vocab-parallel cross-entropy over all ranks there are."""
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    function = importlib.import_module("megatron.core.tensor_parallel").vocab_parallel_cross_entropy
    if not dist.is_initialized():
        kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()
        dist.init_process_group(kind, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())

    def loss(inputs: Inputs) -> Tensor:
        if inputs.shape.vocab % inputs.shards:  # it takes a rank's first id for rank x rows of the rank
            raise ValueError(f"needs shards of one size, and {inputs.shape.vocab} rows do not make {inputs.shards}")
        weights = torch.softmax(inputs.gate_logits, 1)
        z = sum(weights[:, j, None] * (states @ inputs.heads[j].t()) for j, states in enumerate(inputs.hidden))
        return cast(Tensor, function(z, inputs.target).mean())

    return loss


PEERS: dict[str, Callable[[], Loss]] = {
    PLAIN: plain,
    ONE_GEMM: one_gemm,
    "torch.compile": compiled,
    "megatron": megatron,
    "liger-kernel": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
_WHOLE_ROWS = "needs the logits of the whole vocabulary on one rank"
NOT_IN_SHARDS = {  # peers that cannot take part where the vocabulary lies on several ranks: why
    PLAIN: _WHOLE_ROWS,
    ONE_GEMM: _WHOLE_ROWS,
    "torch.compile": _WHOLE_ROWS,
    "liger-kernel": "needs the head of the whole vocabulary on one rank",
    "cut-cross-entropy": "needs a GPU, and the shards lie on CPU ranks",
}
BACKENDS = {"forward": ("chunked",), "gate_only": ("gate_only", "chunked"), "train": ("chunked",)}
GPU_BACKENDS = ("streaming",)  # of every task


def floor(inputs: Inputs, task: str) -> Callable[[], None]:
    """The task's bare matrix products, outputs allocated once: x_j W_j^T, and for training dz W_j and dz^T x_j."""
    logits = inputs.hidden[0].new_empty((inputs.shape.tokens, inputs.heads[0].shape[0]))
    d_hidden = [torch.empty_like(states) for states in inputs.hidden]
    d_heads = [torch.empty_like(head) for head in inputs.heads]

    @torch.no_grad()
    def products() -> None:
        for states, head in zip(inputs.hidden, inputs.heads, strict=True):
            torch.mm(states, head.t(), out=logits)
        if task == "train":
            for j, (states, head) in enumerate(zip(inputs.hidden, inputs.heads, strict=True)):
                torch.mm(logits, head, out=d_hidden[j])
                torch.mm(logits.t(), states, out=d_heads[j])

    return products


def step(inputs: Inputs, loss: Loss, task: str) -> Callable[[], Tensor]:
    """One call as a trainer makes it: forward, and backward where something needs it. Returns the loss."""

    def run() -> Tensor:
        value = loss(inputs)
        if task != "forward":
            value.backward()
        return value.detach()

    return run


def measure(
    inputs: Inputs, task: str, losses: dict[str, Loss], repeats: int, failed: dict[str, str] | None = None
) -> list[Result]:
    """Median times over ``repeats`` rounds in which the variants take turns, then each one's peak memory.

    A variant that raises (out of memory, say) or gives another loss is left out and its reason put in ``failed``.
    """
    with torch.no_grad():
        expected = float(ours("chunked")(inputs))
    gradient_bytes = inputs.require(TASKS[task][0])
    results: dict[str, Result] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, loss in losses.items():
        inputs.drop_gradients()
        try:
            found = float(step(inputs, loss, task)())  # warms up: compiles, autotunes, pages in
            if not abs(found - expected) <= LOSS_TOLERANCE[inputs.shape.dtype] * max(expected, 1.0):
                raise ValueError(f"gives a loss of {found:.5f} where chunked gives {expected:.5f}")
        except Exception as error:  # out of memory, a kernel that does not fit: the others shall be measured
            if failed is None:
                raise
            failed[f"{task}: {name}"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            continue
        results[name] = Result(task, name, gradient_bytes=gradient_bytes)
        calls[name] = step(inputs, loss, task)
    for name, call in calls.items():
        results[name].peak_extra_bytes = _peak(inputs, call)
    calls = {FLOOR: floor(inputs, task), **calls}
    results = {FLOOR: Result(task, FLOOR)} | results
    _timed(inputs, calls[FLOOR])
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.process_time()
            results[name].seconds.append(_timed(inputs, call))
            results[name].cpu_seconds.append(time.process_time() - begun)
    return list(results.values())


def _timed(inputs: Inputs, call: Callable[[], object]) -> float:
    inputs.drop_gradients()
    if inputs.group is not None:
        dist.barrier()
    if inputs.device.type == "cuda":
        return seconds_on_gpu(call)
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def seconds_on_gpu(call: Callable[[], object]) -> float:
    """Between the events before and after what ``call`` puts on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _peak(inputs: Inputs, call: Callable[[], object]) -> int:
    """Bytes held at the worst moment of ``call`` beyond those held before it. Linux, or CUDA's own counter."""
    inputs.drop_gradients()
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_back_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _give_back_freed_memory() -> None:
    """Return to the system what glibc keeps of freed memory, which a call could reuse without a trace."""
    with contextlib.suppress(AttributeError):  # other C libraries keep little and have no such function
        ctypes.CDLL(None).malloc_trim(0)


def _resident(what: str) -> int:
    with contextlib.suppress(OSError):
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return 0
