"""csrc/gate_kernels.cu against its plain PyTorch twin, on a real GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ultrafuser_mega.ops import gate_scale, gate_scale_cuda, gate_scale_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not gate_scale_cuda.serves(torch.device("cuda"), torch.float32, 1),
        reason="the CUDA extension was not built (UFM_BUILD_CUDA=1 python setup.py build_ext --inplace says why)",
    ),
]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = {
    "whole vectors": (5120, 4096, 3584),
    "tails": (1028, 20, 8),  # fp32: whole; 16-bit: 1028 is 128 vectors and a half, in rows that are not aligned
    "odd": (1, 7, 333),
    "one": (64,),
    "sixteen": (24,) * 16,
}


def inputs(widths: tuple[int, ...], dtype: torch.dtype, rows: int = 37) -> Any:
    draw = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": draw, "device": "cuda"}
    gate_logits = torch.randn(rows, len(widths), **options) * 3
    hidden = [torch.randn(rows, d, **options).to(dtype) for d in widths]
    kept = torch.rand(rows, **options) < 0.8
    d_inputs = [torch.randn(rows, d, **options) for d in widths]
    for states, dx in zip(hidden, d_inputs, strict=True):
        states[~kept] = math.nan
        dx[~kept] = 0.0
    gate_logits[~kept] = math.inf
    return gate_logits, kept, hidden, d_inputs


def compare(widths: Any, dtype: torch.dtype, case: Any, written: torch.dtype) -> None:
    gate_logits, kept, hidden, d_inputs = case
    weights, scaled = gate_scale_cuda.scale_inputs(gate_logits, kept, hidden, dtype)
    twin_weights, twin_scaled = gate_scale_torch.scale_inputs(gate_logits, kept, hidden, dtype)
    torch.testing.assert_close(weights, twin_weights, rtol=1e-6, atol=1e-7)  # the exponentials differ in the last bit
    for x, twin in zip(scaled, twin_scaled, strict=True):
        torch.testing.assert_close(x, twin, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    outputs = []
    for kernels in (gate_scale_cuda, gate_scale_torch):
        d_hidden = [torch.full(states.shape, 7.0, dtype=written, device="cuda") for states in hidden]
        d_gate = torch.full_like(gate_logits, 7.0)
        kernels.unscale_gradients(twin_weights, kept, hidden, d_inputs, d_hidden, d_gate)
        outputs.append((d_hidden, d_gate))
    (d_hidden, d_gate), (twin_d_hidden, twin_d_gate) = outputs
    for dh, twin in zip(d_hidden, twin_d_hidden, strict=True):
        assert torch.equal(dh, twin)  # one product, rounded once: no room for a difference
    torch.testing.assert_close(d_gate, twin_d_gate, rtol=1e-5, atol=1e-6 * max(widths))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_kernels_do_what_their_twin_does(widths: Any, dtype: torch.dtype) -> None:
    case = inputs(widths, dtype)
    for written in {dtype, torch.float32}:
        compare(widths, dtype, case, written)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tensors_that_start_or_step_off_16_bytes(dtype: torch.dtype) -> None:
    widths = (256, 40)
    gate_logits, kept, hidden, d_inputs = inputs(widths, dtype)
    shifted = [torch.cat((states[:, :1], states), 1)[:, 1:] for states in hidden]  # start + 1, stride + 1
    compare(widths, dtype, (gate_logits, kept, shifted, d_inputs), dtype)
    transposed = [states.t().contiguous().t() for states in hidden]
    compare(widths, dtype, (gate_logits, kept, transposed, d_inputs), dtype)


def test_only_what_has_an_output_is_written() -> None:
    gate_logits, kept, hidden, d_inputs = inputs((64, 48), torch.bfloat16)
    weights = torch.softmax(gate_logits.masked_fill(~kept[:, None], 0.0), 1)
    both, d_gate = [torch.empty_like(states) for states in hidden], torch.empty_like(gate_logits)
    gate_scale_cuda.unscale_gradients(weights, kept, hidden, d_inputs, both, d_gate)
    one, gate_alone = torch.empty_like(hidden[1]), torch.empty_like(gate_logits)
    gate_scale_cuda.unscale_gradients(weights, kept, hidden, [None, d_inputs[1]], [None, one], None)
    gate_scale_cuda.unscale_gradients(weights, kept, hidden, d_inputs, [None, None], gate_alone)
    assert torch.equal(one, both[1]) and torch.equal(gate_alone, d_gate)


def test_no_rows() -> None:
    gate_logits, kept, hidden, d_inputs = inputs((64, 48), torch.bfloat16, rows=0)
    weights, scaled = gate_scale_cuda.scale_inputs(gate_logits, kept, hidden, torch.bfloat16)
    assert weights.shape == (0, 2) and scaled[1].shape == (0, 48)
    gate_scale_cuda.unscale_gradients(weights, kept, hidden, d_inputs, [None, None], torch.empty_like(gate_logits))


def test_a_row_does_not_depend_on_the_rows_that_come_with_it_and_repeats_every_bit() -> None:
    gate_logits, kept, hidden, d_inputs = inputs((5120, 333), torch.bfloat16)

    def run(rows: Any) -> Any:
        weights, scaled = gate_scale.scale_inputs(
            gate_logits[rows], kept[rows], [states[rows] for states in hidden], torch.bfloat16
        )
        d_gate = torch.empty_like(weights)
        part = [dx[rows] for dx in d_inputs], [None, None], d_gate
        gate_scale.unscale_gradients(weights, kept[rows], [states[rows] for states in hidden], *part)
        return weights, *scaled, d_gate

    whole, again, tail = run(slice(0, 37)), run(slice(0, 37)), run(slice(30, 37))
    for first, second, last in zip(whole, again, tail, strict=True):
        assert torch.equal(first, second) and torch.equal(first[30:], last)


def test_offsets_beyond_32_bits() -> None:
    rows, width = 270_000, 8192  # rows * width > 2^31
    hidden = torch.ones(1, width, dtype=torch.bfloat16, device="cuda").expand(rows, width).contiguous()
    hidden[-1] = 3.0
    gate_logits = torch.zeros(rows, 1, device="cuda")
    kept = torch.ones(rows, dtype=torch.bool, device="cuda")
    _, (scaled,) = gate_scale_cuda.scale_inputs(gate_logits, kept, [hidden], torch.bfloat16)
    assert bool((scaled[-1] == 3.0).all()) and bool((scaled[:-1].amax(1) == 1.0).all())


def test_more_specialists_than_the_kernels_hold_take_the_plain_path() -> None:
    hidden = [torch.zeros(2, 4, device="cuda")] * 17
    assert gate_scale._chosen(hidden, torch.float32) is gate_scale_torch
    assert gate_scale._chosen(hidden[:16], torch.float32) is gate_scale_cuda


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_current_device_stays_what_it_was() -> None:
    gate_scale_cuda._kernels.cache_clear()
    assert gate_scale_cuda.serves(torch.device("cuda", 1), torch.float32, 1)
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0
