"""Every backend on a real GPU: the rule of plain PyTorch in each type, no host synchronisation, repeatable bits."""

from __future__ import annotations

import pytest
import torch

from ultrafuser_mega.ops import mixture_cross_entropy
from ultrafuser_mega.ops.testing import answer_of, make_case, relative_error, rule_violations, truth, upstream_of

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
]


@pytest.fixture(autouse=True)
def full_precision_products():
    """TF32 would make plain PyTorch the less exact one and the rule too easy."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("widths", "vocab", "rows"), SHAPES)
def test_error_stays_within_the_rule_of_plain_pytorch(widths, vocab, rows, reduction, dtype, backend, needs):
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
def test_float64_agrees_with_the_closed_form(backend):
    case = make_case(82, rows=37, vocab=333, widths=(8, 12), dtype=torch.float64, device="cuda", padding=3)
    answer, expected = answer_of(mixture_cross_entropy, case, backend=backend), truth(case)
    for name, gradient in answer.gradients().items():
        assert relative_error(gradient, expected.gradients()[name]) <= 1e-11, name


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_never_waits_for_the_device(reduction, backend, needs):
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
def test_repeating_a_call_repeats_every_bit(backend, needs):
    case = make_case(84, rows=1000, vocab=5000, widths=(64, 64), dtype=torch.bfloat16, device="cuda")
    first, second = (answer_of(mixture_cross_entropy, case, needs, backend=backend) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    for name, gradient in first.gradients().items():
        assert torch.equal(gradient, second.gradients()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_gradients_added_to_fp32_buffers_without_waiting_for_the_device(reduction, dtype):
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


def test_more_logits_than_32_bits_can_count():
    """N * V > 2^31: offsets must be 64 bits wide. A repeated row must give a repeated loss."""
    rows, vocab = 16384, 151936
    case = make_case(85, rows=64, vocab=vocab, widths=(16,), dtype=torch.bfloat16, device="cuda", ignored=0.0)
    repeats = rows // 64
    hidden = [states.repeat(repeats, 1) for states in case.hidden]
    gate, target = case.gate_logits.repeat(repeats, 1), case.target.repeat(repeats)
    for backend in ("chunked", "streaming"):
        loss = mixture_cross_entropy(hidden, case.heads, gate, target, reduction="none", backend=backend)
        torch.testing.assert_close(loss[-64:], loss[:64], rtol=1e-5, atol=1e-5)


def test_a_target_outside_the_vocabulary_gives_an_infinite_loss():
    case = make_case(86, rows=4, vocab=50, widths=(16,), device="cuda", ignored=0.0, reduction="none")
    case.target[2] = 77
    for backend in ("chunked", "streaming"):
        loss = mixture_cross_entropy(
            case.hidden, case.heads, case.gate_logits, case.target, reduction="none", backend=backend
        )
        assert torch.isinf(loss).tolist() == [False, False, True, False]
