"""The gate's work around the GEMMs in plain PyTorch: against float64 formulas written apart, and against autograd.

This is the twin that the CUDA kernels are held to (tests/gpu/test_gate_kernels.py) and what a CPU runs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.mixture_cases import relative_error

from ultrafuser_mega.ops import gate_scale, gate_scale_torch

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [(8,), (16, 7), (8, 12, 5), (1, 3, 24, 130, 4)]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(widths: tuple[int, ...], dtype: torch.dtype, rows: int = 11, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    gate_logits = torch.randn(rows, len(widths), generator=draw, dtype=torch.float64).to(wide(dtype)) * 3
    hidden = [torch.randn(rows, d, generator=draw, dtype=torch.float64).to(dtype) for d in widths]
    kept = torch.rand(rows, generator=draw) < 0.8
    d_inputs = [torch.randn(rows, d, generator=draw, dtype=torch.float64).to(wide(dtype)) for d in widths]
    for dx in d_inputs:
        dx[~kept] = 0.0
    return gate_logits, kept, hidden, d_inputs


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_inputs_are_the_hidden_states_times_the_softmax_rounded_once(widths: Any, dtype: torch.dtype) -> None:
    gate_logits, kept, hidden, _ = inputs(widths, dtype)
    gate_weights, scaled = gate_scale.scale_inputs(gate_logits, kept, hidden, dtype)
    exponentials = gate_logits.double().exp()
    expected = exponentials / exponentials.sum(1, keepdim=True)
    few_roundings = 4 * torch.finfo(wide(dtype)).eps
    assert relative_error(gate_weights[kept], expected[kept]) <= few_roundings
    for j, x in enumerate(scaled):
        true = expected[:, j, None] * hidden[j].double()
        assert x.dtype == dtype
        assert relative_error(x[kept], true[kept]) <= few_roundings + torch.finfo(dtype).eps / 2
        assert torch.count_nonzero(x[~kept]) == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_gradients_are_those_of_the_formulas(widths: Any, dtype: torch.dtype) -> None:
    """dw_j = <h_j, dx_j>, dh_j = w_j dx_j, da_j = w_j (dw_j - sum_k w_k dw_k), in float64 and row by row."""
    gate_logits, kept, hidden, d_inputs = inputs(widths, dtype)
    gate_weights = torch.softmax(gate_logits, 1)
    d_hidden = [torch.empty_like(states) for states in hidden]
    d_gate = torch.empty_like(gate_logits)
    gate_scale.unscale_gradients(gate_weights, kept, hidden, d_inputs, d_hidden, d_gate)
    eps = torch.finfo(wide(dtype)).eps
    for i in range(len(kept)):
        w = gate_weights[i].double()
        terms = [hidden[j][i].double() * d_inputs[j][i].double() for j in range(len(widths))]
        dw = torch.stack([t.sum() for t in terms])
        da = w * (dw - (w * dw).sum()) if kept[i] else torch.zeros_like(w)
        # a sum of d terms in any order errs by at most d eps sum |term|; the softmax adds the specialists'
        bound = 2 * sum(len(t) * float(t.abs().sum()) for t in terms) * eps
        assert float((d_gate[i].double() - da).abs().max()) <= bound
    for j, dh in enumerate(d_hidden):
        true = gate_weights[:, j, None].double() * d_inputs[j].double()
        assert relative_error(dh, true) <= eps + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_backward_is_the_gradient_of_forward(widths: Any) -> None:
    gate_logits, kept, hidden, d_inputs = inputs(widths, torch.float64)
    gate_logits.requires_grad_()
    leaves = [states.requires_grad_() for states in hidden]
    masked = gate_logits.masked_fill(~kept[:, None], 0.0)
    scaled = [torch.softmax(masked, 1)[:, j, None] * states for j, states in enumerate(leaves)]
    expected = torch.autograd.grad(scaled, [gate_logits, *leaves], d_inputs)
    detached = [states.detach() for states in hidden]
    gate_weights, _ = gate_scale.scale_inputs(gate_logits.detach(), kept, detached, torch.float64)
    d_gate, d_hidden = torch.empty_like(gate_weights), [torch.empty_like(states) for states in detached]
    gate_scale.unscale_gradients(gate_weights, kept, detached, d_inputs, d_hidden, d_gate)
    for value, true in zip((d_gate, *d_hidden), expected, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-12)


def test_a_gate_that_has_settled_keeps_its_gradient_and_what_all_dw_have_in_common_does_not_matter() -> None:
    """w_1 = 1 - 4e-9 is 1 in fp32, and dw near 1e6 is known to 0.03."""
    gate_weights = torch.softmax(torch.tensor([[20.0, 0.0, -1.0]]), 1)
    dw = torch.tensor([1e6, 1e6 + 4.0, 1e6 - 8.0])
    ones, d_inputs = [torch.ones(1, 1)] * 3, [dw[j].reshape(1, 1) for j in range(3)]
    d_gate = torch.empty(1, 3)
    gate_scale.unscale_gradients(gate_weights, torch.ones(1, dtype=torch.bool), ones, d_inputs, [None] * 3, d_gate)
    w = torch.softmax(torch.tensor([20.0, 0.0, -1.0]).double(), 0)
    true = w * (w * (dw.double()[:, None] - dw.double())).sum(1)
    torch.testing.assert_close(d_gate[0].double(), true, rtol=1e-6, atol=0.0)


def test_only_what_has_an_output_is_written() -> None:
    gate_logits, kept, hidden, d_inputs = inputs((4, 3), torch.float32)
    gate_weights = torch.softmax(gate_logits, 1)
    both = [torch.empty_like(states) for states in hidden]
    gate_scale.unscale_gradients(gate_weights, kept, hidden, d_inputs, both, torch.empty_like(gate_logits))
    one = torch.empty_like(hidden[1])
    gate_scale.unscale_gradients(gate_weights, kept, hidden, [None, d_inputs[1]], [None, one], None)
    assert torch.equal(one, both[1])


def test_an_ignored_row_may_hold_anything() -> None:
    gate_logits, kept, hidden, d_inputs = inputs((4, 3), torch.float32)
    for tensor in (gate_logits, *hidden):
        tensor[~kept] = math.nan
    gate_weights, scaled = gate_scale.scale_inputs(gate_logits, kept, hidden, torch.float32)
    d_gate, d_hidden = torch.empty_like(gate_weights), [torch.empty_like(states) for states in hidden]
    gate_scale.unscale_gradients(gate_weights, kept, hidden, d_inputs, d_hidden, d_gate)
    for tensor in (*scaled, *d_hidden, d_gate):
        assert torch.count_nonzero(tensor[~kept]) == 0
    assert torch.equal(gate_weights[~kept], torch.full_like(gate_weights[~kept], 0.5))


def test_a_specialist_that_the_gate_excludes_gets_nothing() -> None:
    gate_logits, kept, hidden, d_inputs = inputs((4, 3), torch.float32)
    gate_logits[:, 0] = -math.inf
    gate_weights, scaled = gate_scale.scale_inputs(gate_logits, kept, hidden, torch.float32)
    d_gate, d_hidden = torch.empty_like(gate_weights), [torch.empty_like(states) for states in hidden]
    gate_scale.unscale_gradients(gate_weights, kept, hidden, d_inputs, d_hidden, d_gate)
    assert torch.count_nonzero(scaled[0]) == torch.count_nonzero(d_hidden[0][kept]) == 0
    assert torch.count_nonzero(d_gate) == 0
    assert torch.equal(scaled[1][kept], hidden[1][kept])


def test_sixteen_bit_states_may_have_wide_gradients_and_inputs() -> None:
    """fp16 gradients wait for their upstream factor in fp32; a CPU multiplies 16-bit operands in fp32."""
    gate_logits, kept, hidden, d_inputs = inputs((4, 3), torch.float16)
    gate_weights, scaled = gate_scale.scale_inputs(gate_logits, kept, hidden, torch.float32)
    assert all(x.dtype == torch.float32 for x in scaled)
    d_hidden = [torch.empty_like(states, dtype=torch.float32) for states in hidden]
    gate_scale.unscale_gradients(gate_weights, kept, hidden, d_inputs, d_hidden, None)
    assert torch.equal(d_hidden[0], d_inputs[0] * gate_weights[:, :1])


def test_cpu_tensors_take_the_plain_pytorch_path() -> None:
    assert gate_scale._chosen([torch.zeros(1, 4)], torch.float32) is gate_scale_torch
