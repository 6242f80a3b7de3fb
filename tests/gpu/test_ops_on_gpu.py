"""Every backend on a real GPU: the rule of plain PyTorch in each type, no host synchronisation, repeatable bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.mixture_cases import (
    IGNORE,
    Answer,
    answer_of,
    gradient_of,
    make_case,
    relative_error,
    rule_violations,
    truth,
    upstream_of,
)

from ultrafuser_mega.ops import chunked, mixture_cross_entropy, parked_dlogits
from ultrafuser_mega.ops.problem import checked_problem
from ultrafuser_mega.ops.statistics import MAX, SUM_EXP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EVERYTHING, GATE = (True, True, True), (True, False, False)
BACKENDS = [
    ("chunked", EVERYTHING),
    ("streaming", EVERYTHING),
    ("gate_only", GATE),
    ("streaming", GATE),
    ("chunked", GATE),
]
SHAPES = [
    ((64, 128, 96), 333, 37),
    ((256, 256, 256), 32016, 300),
    ((64, 80), 151936, 65),
    ((32,), 7, 1),
    ((48,) * 5, 1000, 40),
    ((33, 50), 333, 37),  # rows that no tensor descriptor can describe
]


@pytest.fixture(autouse=True)
def full_precision_products() -> Iterator[Any]:
    """TF32 would make plain PyTorch the less exact one and the rule too easy."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("widths", "vocab", "rows"), SHAPES)
def test_error_stays_within_the_rule_of_plain_pytorch(
    widths: Any, vocab: Any, rows: Any, reduction: str, dtype: Any, backend: str, needs: Any
) -> None:
    case = make_case(
        81,
        rows=rows,
        vocab=vocab,
        widths=widths,
        dtype=dtype,
        device="cuda",
        padding=5,
        reduction=reduction,
        label_smoothing=0.1,
        z_loss=1e-4,
    )
    assert rule_violations(answer_of(mixture_cross_entropy, case, needs, backend=backend), case) == []


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_float64_agrees_with_the_closed_form(backend: str) -> None:
    case = make_case(82, rows=37, vocab=333, widths=(8, 12), dtype=torch.float64, device="cuda", padding=3)
    answer, expected = answer_of(mixture_cross_entropy, case, backend=backend), truth(case)
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-11, name


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_never_waits_for_the_device(reduction: str, backend: str, needs: Any) -> None:
    case = make_case(
        83, rows=300, vocab=1000, widths=(64, 64), dtype=torch.bfloat16, device="cuda", reduction=reduction
    )
    answer_of(mixture_cross_entropy, case, needs, backend=backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        answer_of(mixture_cross_entropy, case, needs, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
def test_repeating_a_call_repeats_every_bit(backend: str, needs: Any) -> None:
    case = make_case(84, rows=1000, vocab=5000, widths=(64, 64), dtype=torch.bfloat16, device="cuda")
    first, second = (answer_of(mixture_cross_entropy, case, needs, backend=backend) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    for name, gradient in first.gradients().items():
        assert torch.equal(gradient, second.gradients()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_gradients_added_to_fp32_buffers_without_waiting_for_the_device(reduction: str, dtype: Any) -> None:
    case = make_case(87, rows=300, vocab=1000, widths=(64, 96), dtype=dtype, device="cuda", reduction=reduction)
    heads = [head.requires_grad_() for head in case.heads]
    upstream = upstream_of(case)

    def run() -> list[torch.Tensor]:
        buffers = [torch.zeros(head.shape, device="cuda") for head in heads]
        loss = mixture_cross_entropy(
            case.hidden, heads, case.gate_logits, case.target, **case.options, head_main_grad=buffers
        )
        loss.backward(upstream)
        return buffers

    first = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for j, (buffer, again) in enumerate(zip(first, second, strict=True)):
        assert heads[j].grad is None and torch.equal(buffer, again)
        # dz is rounded to the heads' type once; the sums are not
        assert relative_error(buffer, truth(case).heads[j]) <= torch.finfo(dtype).eps + 1e-4


def test_more_logits_than_32_bits_can_count() -> None:
    """N * V > 2^31: offsets must be 64 bits wide. A repeated row must give a repeated loss."""
    rows, vocab = 16384, 151936
    case = make_case(85, rows=64, vocab=vocab, widths=(16,), dtype=torch.bfloat16, device="cuda", ignored=0.0)
    repeats = rows // 64
    hidden = [states.repeat(repeats, 1) for states in case.hidden]
    gate, target = case.gate_logits.repeat(repeats, 1), case.target.repeat(repeats)
    for backend in ("chunked", "streaming"):
        loss = mixture_cross_entropy(hidden, case.heads, gate, target, reduction="none", backend=backend)
        torch.testing.assert_close(loss[-64:], loss[:64], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [16400, 16401], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("needs", [EVERYTHING, GATE], ids=["everything", "gate"])
def test_streaming_reads_hidden_states_that_lie_further_apart_than_32_bits_can_count(needs: Any, stride: int) -> None:
    """rows * stride > 2^31. Rows that start at odd numbers of elements cannot be described to TMA."""
    rows = 131072
    case = make_case(90, rows=64, vocab=500, widths=(16, 16), dtype=torch.bfloat16, device="cuda", reduction="none")
    repeats = rows // 64
    hidden = [torch.empty(rows, stride, dtype=torch.bfloat16, device="cuda")[:, :16] for _ in range(2)]
    for far, near in zip(hidden, case.hidden, strict=True):
        far.copy_(near.repeat(repeats, 1)).requires_grad_(needs[1])
        assert (rows - 64) * far.stride(0) > 2**31
    heads = [head.clone().requires_grad_(needs[2]) for head in case.heads]
    gate = case.gate_logits.repeat(repeats, 1).requires_grad_()
    target = case.target.repeat(repeats)
    loss = mixture_cross_entropy(hidden, heads, gate, target, **case.options, backend="streaming")
    loss.backward(upstream_of(case).repeat(repeats))
    assert torch.equal(loss[-64:], loss[:64])
    last = Answer(
        loss[-64:].detach(),
        gradient_of(gate)[-64:],
        [gradient_of(states)[-64:] for states in hidden if needs[1]],
        [gradient_of(head) / repeats for head in heads if needs[2]],  # a power of two: exact
    )
    assert rule_violations(last, case) == []


def test_a_target_outside_the_vocabulary_gives_an_infinite_loss() -> None:
    case = make_case(86, rows=4, vocab=50, widths=(16,), device="cuda", ignored=0.0, reduction="none")
    case.target[2] = 77
    for backend in ("chunked", "streaming"):
        loss = mixture_cross_entropy(
            case.hidden, case.heads, case.gate_logits, case.target, reduction="none", backend=backend
        )
        assert torch.isinf(loss).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("vocab", "width"), [(32000, 5120), (4000, 5120), (128256, 4096), (16032, 4096)])
@pytest.mark.parametrize(("backend", "bar_mib"), [("chunked", 1024), ("streaming", 64)])
def test_memory_beyond_the_gradients(backend: str, bar_mib: Any, vocab: Any, width: Any) -> None:
    """What tests/unit/ops/test_memory_bars.py counts without a GPU, as CUDA's allocator sees it."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    hidden = [torch.randn(8192, width, **half) for _ in range(3)]
    heads = [torch.zeros(vocab, width, **half) for _ in range(3)]
    gate = torch.randn(8192, 3, device="cuda", requires_grad=True)
    target = torch.randint(0, vocab, (8192,), device="cuda")
    inputs = [gate, *hidden, *heads]

    def step() -> None:
        mixture_cross_entropy(hidden, heads, gate, target, backend=backend).backward()
        torch.cuda.synchronize()

    step()  # compiles, and the vendor's library takes its own workspace
    for tensor in inputs:
        tensor.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    assert torch.cuda.max_memory_allocated() - before - gradients <= bar_mib << 20


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bf16_head_gradients_of_many_chunks_stay_within_the_rule(reduction: str) -> None:
    """dz waits in the memory of the gradients; a vocabulary block of it is smaller than the vocabulary."""
    case = make_case(
        88, rows=700, vocab=5000, widths=(256, 320, 192), dtype=torch.bfloat16, device="cuda", reduction=reduction
    )

    def loss(hidden: Any, heads: Any, gate_logits: Any, target: Any, **options: Any) -> Any:
        defaults = {"group": None, "vocab_start": 0, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
        problem = checked_problem(hidden, heads, gate_logits, target, **(defaults | options))
        return chunked.mixture_loss(problem, buffer_bytes=4 << 20)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parked_dlogits, "WORKSPACE_BYTES", 1 << 20)
        assert rule_violations(answer_of(loss, case), case) == []


@pytest.mark.parametrize("backend", ["chunked", "streaming"])
@pytest.mark.parametrize("values", [{"logit_scale": 300.0}, {"common_offset": 4096.0}], ids=str)
def test_every_probability_keeps_the_precision_of_bf16(values: Any, backend: str) -> None:
    """As in tests/unit/ops/test_large_logits.py; the head gradient is rounded to bf16, too."""
    case = make_case(
        131, rows=1, vocab=200, widths=(16, 16), dtype=torch.bfloat16, device="cuda", ignored=0.0, gate_scale=0.0,
        reduction="sum", **values,
    )  # fmt: skip
    pairs = zip(case.hidden, case.heads, strict=True)
    z = torch.stack([0.5 * (states.double() @ head.double().t()) for states, head in pairs]).sum(0)
    allowed = 3 * 2**-8 + 2 * 32 * 2**-24 * float(z.abs().max())  # dz, dW, and its factor: the upstream gradient
    words = torch.softmax(z[0], 0) > 1e-30
    words[case.target] = False
    heads = answer_of(mixture_cross_entropy, case, backend=backend).heads
    for gradient, true in zip(heads, truth(case).heads, strict=True):
        assert float(((gradient.double() - true)[words] / true[words]).abs().max()) <= allowed


@pytest.mark.parametrize("backend", ["chunked", "streaming"])
def test_what_an_ignored_row_holds_does_not_matter(backend: str) -> None:
    case = make_case(89, rows=200, vocab=1000, widths=(64, 96), dtype=torch.bfloat16, device="cuda", reduction="sum")
    clean = answer_of(mixture_cross_entropy, case, backend=backend)
    for states in case.hidden:
        states[case.target == IGNORE] = torch.nan
    dirty = answer_of(mixture_cross_entropy, case, backend=backend)
    assert torch.equal(dirty.loss, clean.loss)
    for name, gradient in dirty.gradients().items():
        assert torch.equal(gradient, clean.gradients()[name]), name


@pytest.mark.parametrize("widths", [(256, 320, 192), (33, 50, 70)], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_logit_of_streaming_has_the_same_bits_in_every_tile_and_by_either_loop(dtype: Any, widths: Any) -> None:
    """What the backward relies on: its exp(z - M) add up to the forward's sum."""
    from stored_tiles import stored_logits

    from ultrafuser_mega.ops import streaming, streaming_tiles

    case = make_case(140, rows=300, vocab=1000, widths=widths, dtype=dtype, device="cuda", gate_scale=4.0)
    case.gate_logits[[3, 70, 139], [0, 1, 2]] = torch.tensor([-60.0, -100.0, -float("inf")], device="cuda")
    aligned = widths[0] % 8 == 0
    capability = streaming_tiles.capability(case.heads[0])
    tiles = [streaming_tiles.tile(name, capability, dtype, 3, aligned) for name in ("statistics", "dlogits")]
    first, *others = [
        stored_logits(case.hidden, case.heads, case.gate_logits, tile, detour=detour)
        for tile in tiles
        for detour in (False, True)
    ]
    for z in others:
        assert torch.equal(z, first)
    problem = checked_problem(
        case.hidden, case.heads, case.gate_logits, case.target, group=None, vocab_start=0, vocab_size=None,
        ignore_index=-100, reduction="sum", label_smoothing=0.0, z_loss=0.0,
    )  # fmt: skip
    statistics = streaming.statistics(problem, streaming.gate_softmax(problem), per_specialist=False)
    kept = case.target != IGNORE  # the others' gate weights are not theirs
    assert torch.equal(statistics[kept, MAX], first.amax(1)[kept])
    sums = (first - first.amax(1, keepdim=True)).double().exp().sum(1)[kept]
    torch.testing.assert_close(statistics[kept, SUM_EXP].double(), sums, rtol=2e-6, atol=0.0)
