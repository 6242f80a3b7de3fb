"""Probabilities keep the precision of their 16 bits however large the logits are, since logits are kept in fp32.

One row, so that dW_v = dz_v x shows every word's probability on its own; equal gate weights of 1/2, so that x = w h is
exact and nothing but the backend's arithmetic is left. K numbers added in fp32 err by at most K 2^-24 |z|, once in a
word's logit and once in what it is compared with; dz is rounded to bf16, 2^-8 at most (on a CPU to fp32). Rounding
logits or a specialist's part of one to bf16 would err by up to 2^-8 |z|: at 4096 by factors of e^8 and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from support.mixture_cases import Case, make_case, truth
from torch import Tensor

from ultrafuser_mega.ops import chunked
from ultrafuser_mega.ops.problem import checked_problem

WIDTHS = (4, 4)
SIZES: dict[str, dict[str, Any]] = {  # of the logits
    "3": {"logit_scale": 3.0},
    "300": {"logit_scale": 300.0},
    "256 + 3": {"common_offset": 256.0},
    "4096 + 3": {"common_offset": 4096.0},
    "-4096 + 30": {"common_offset": -4096.0, "logit_scale": 30.0},
}


def head_gradients(case: Case, triton: bool) -> list[torch.Tensor]:
    """fp32 and unrounded."""
    epilogue = None
    if triton:
        from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue

        epilogue = TritonEpilogue(torch.bfloat16)
    heads = [head.clone().requires_grad_() for head in case.heads]
    buffers = [torch.zeros(head.shape) for head in heads]
    problem = checked_problem(
        case.hidden, heads, case.gate_logits, case.target, group=None, vocab_start=0, vocab_size=None,
        ignore_index=-100, reduction="sum", label_smoothing=0.0, z_loss=0.0,
    )  # fmt: skip
    chunked.mixture_loss(problem, head_main_grad=buffers, epilogue=epilogue)[0].backward()
    return buffers


def of_one_row(size: Any) -> Iterator[tuple[Case, Tensor, Tensor]]:
    """(case, z (1, V), words to compare (V,) bool) of seeds with which there are such: large logits leave few."""
    for seed in count(131):
        case = make_case(
            seed, rows=1, vocab=200, widths=WIDTHS, dtype=torch.bfloat16, ignored=0.0, gate_scale=0.0, reduction="sum",
            **SIZES[size],
        )  # fmt: skip
        pairs = zip(case.hidden, case.heads, strict=True)
        z = torch.stack([0.5 * (states.double() @ head.double().t()) for states, head in pairs]).sum(0)
        words = torch.softmax(z[0], 0) > 1e-30  # fp32 and bf16 end at 1e-38
        words[case.target] = False  # p - 1
        if words.sum() > 1:
            yield case, z, words


@pytest.mark.parametrize("triton", [False, True], ids=["CPU", "Triton, interpreted"])
@pytest.mark.parametrize("size", SIZES)
def test_every_probability_keeps_the_precision_of_bf16(size: Any, triton: bool, interpreted: Any) -> None:
    case, z, words = next(of_one_row(size))
    found = interpreted(head_gradients, case, True) if triton else head_gradients(case, False)
    rounding = 2**-7 if triton else 2**-8  # Triton's interpreter cuts bf16 off; a GPU rounds
    allowed = rounding + 2 * sum(WIDTHS) * 2**-24 * float(z.abs().max())
    for gradient, true in zip(found, truth(case).heads, strict=True):
        true = true[words] / 1.25  # truth's upstream gradient
        assert float(((gradient[words] - true) / true).abs().max()) <= allowed
