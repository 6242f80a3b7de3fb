"""Memory beyond the gradients at the sizes of real models: counted on tensors without data ("meta").

Kernels and GEMMs are left out, since they allocate nothing; everything else is the code that runs on a GPU. The gate's
CUDA kernels are absent, so what plain PyTorch needs in their place counts, too.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultrafuser_mega.ops import automatic, chunked, gate_only
from ultrafuser_mega.ops.forward import BUFFER_BYTES
from ultrafuser_mega.ops.problem import checked_problem

ROWS = 8192
SHAPES = {  # vocabulary, widths
    "llama2-13b": (32000, (5120,) * 3),
    "llama2-13b, an eighth": (4000, (5120,) * 3),
    "llama3-8b": (128256, (4096,) * 3),
    "llama3-8b, an eighth": (16032, (4096,) * 3),
}
TASKS = {  # needs gate, hidden, heads
    "forward": (False, False, False),
    "gate alone": (True, False, False),
    "frozen heads": (True, True, False),
    "train": (True, True, True),
}
MIB = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors born inside this context that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), inputs)
        return result

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in inputs or key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def problem_of(shape: str, needs: tuple[bool, bool, bool], reduction: str) -> Any:
    vocab, widths = SHAPES[shape]
    gate, hidden, heads = needs
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    tensors = (
        [torch.empty(ROWS, d, **half, requires_grad=hidden) for d in widths],
        [torch.empty(vocab, d, **half, requires_grad=heads) for d in widths],
        torch.empty(ROWS, len(widths), device="meta", requires_grad=gate),
        torch.empty(ROWS, dtype=torch.int64, device="meta"),
    )
    settings: dict[str, Any] = {"vocab_start": 0, "vocab_size": None, "ignore_index": -100}
    settings |= {"label_smoothing": 0.1, "z_loss": 1e-4}
    problem = checked_problem(*tensors, group=None, reduction=reduction, **settings)
    gradients = sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if t.requires_grad)
    return problem, gradients


def workspace(loss_of: Any, shape: str, task: str, reduction: str) -> float:
    """MiB beyond the gradients at the worst moment of a forward and, where anything is trained, a backward."""
    problem, gradients = problem_of(shape, TASKS[task], reduction)
    upstream = torch.empty(ROWS if reduction == "none" else (), device="meta")
    with LiveBytes() as live, torch.set_grad_enabled(task != "forward"):
        loss = loss_of(problem)[0]
        if task != "forward":
            loss.backward(upstream)
    return (live.peak - gradients) / MIB


@pytest.fixture
def silent_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrafuser_mega.ops.gemm.accumulate", lambda *args, **options: None)


class SilentEpilogue:
    """TritonEpilogue without its kernels."""

    operand_dtype = torch.bfloat16

    def statistics(self, logits: Any, target: Any, keep: Any) -> Any:
        return logits.new_empty((logits.shape[0], 4)), None

    def dlogits(self, logits: Any, scratch: Any, target: Any, row_max: Any, coefficients: Any) -> Any:
        rows, columns = logits.shape
        return torch.empty(0, dtype=torch.bfloat16, device="meta").set_(
            logits.untyped_storage(), 2 * logits.storage_offset(), (rows, columns), (2 * logits.stride(0), 1)
        )

    def mixture_statistics(self, logits: Any, gate_weights: Any, target: Any) -> Any:
        return logits.new_empty((logits.shape[1], 4 + 3 * logits.shape[0]))

    def mixture_dlogits(self, logits: Any, gate_weights: Any, *_: Any) -> Any:
        plane, row, _ = logits.stride()
        return torch.empty(0, dtype=torch.bfloat16, device="meta").set_(
            logits.untyped_storage(), 0, logits.shape, (2 * plane, 2 * row, 1)
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_and_gate_only_stay_within_one_gibibyte(
    shape: Any, task: Any, reduction: str, silent_products: Any
) -> None:
    backend = gate_only if task == "gate alone" else chunked

    def loss_of(problem: Any) -> Any:
        return backend.mixture_loss(problem, epilogue=SilentEpilogue(), buffer_bytes=BUFFER_BYTES["cuda"])

    used = workspace(loss_of, shape, task, reduction)
    assert 64 < used <= 1024  # and the count is not blind


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_stays_within_64_mebibytes(
    shape: Any, task: Any, reduction: str, silent_products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming = pytest.importorskip("ultrafuser_mega.ops.streaming")

    monkeypatch.setattr(streaming, "launch", lambda *args: None)
    used = workspace(streaming.mixture_loss, shape, task, reduction)
    assert ROWS * 4 * 4 / MIB < used <= 64  # more than the statistics alone


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_auto_expects_a_backend_to_hold_is_what_it_holds(
    shape: Any, task: Any, reduction: str, silent_products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrafuser_mega.ops.chunked.epilogue_for", lambda *_of: SilentEpilogue())
    for module in (automatic, chunked, gate_only):
        monkeypatch.setattr(module, "buffer_budget", lambda _device: BUFFER_BYTES["cuda"])
    with torch.set_grad_enabled(task != "forward"):
        problem, gradients = problem_of(shape, TASKS[task], reduction)
        backend = automatic.choose(problem, None)
        expected = automatic.planned_bytes(problem, backend)
        assert automatic.choose(problem, expected) == backend == ("gate_only" if task == "gate alone" else "chunked")
        assert automatic.choose(problem, expected - 1) == "streaming"

    def loss_of(problem: Any) -> Any:
        module = gate_only if backend == "gate_only" else chunked
        return module.mixture_loss(problem, epilogue=SilentEpilogue())

    held = workspace(loss_of, shape, task, reduction) * MIB + gradients * (task != "gate alone")
    assert 0.7 * held <= expected <= 1.3 * held


def test_free_memory_is_the_drivers_and_what_pytorch_keeps_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = problem_of("llama2-13b", TASKS["train"], "mean")
    assert automatic.free_bytes(problem) is None  # no GPU
    for name, value in {"mem_get_info": (700, 1000), "memory_reserved": 200, "memory_allocated": 150}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert automatic.free_bytes(problem) == 750
    sharded = replace(problem, settings=replace(problem.settings, group=object()))
    assert automatic.free_bytes(sharded) is None
