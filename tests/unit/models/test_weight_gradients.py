"""Weight gradients are added to their float32 buffers by what computes them, unrounded."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding, layers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ultrafuser_mega.models.weight_gradients import accumulated_weight_gradients, adding_in_place
from ultrafuser_mega.ops import gemm
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.spawn import run_ranks

CPU = torch.device("cpu")
TOKENS, WIDTH, OUT, MICROBATCHES = 40, 32, 24, 8
NAMES = ("_grad_accum_fusion_available", "fused_weight_gradient_mlp_cuda")


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def accumulated(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Counter[str]]:
    """(buffer after some microbatches, the same in float64, .grad, operations of the last backward)."""
    generator = torch.Generator().manual_seed(1)
    config = ModelParallelConfig(
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
    )
    with megatron_scope(CPU), accumulated_weight_gradients(CPU):
        layer = ColumnParallelLinear(
            WIDTH, OUT, config=config, init_method=lambda weight: None, bias=False, tp_group=dist.group.WORLD
        )
        with torch.no_grad():
            layer.weight.copy_(torch.randn(OUT, WIDTH, generator=generator))
        layer.weight.main_grad = torch.ones(OUT, WIDTH)
        expected = torch.ones(OUT, WIDTH, dtype=torch.float64)
        for _ in range(MICROBATCHES):
            x = torch.randn(TOKENS, 1, WIDTH, generator=generator).to(dtype).requires_grad_()
            upstream = torch.randn(TOKENS, 1, OUT, generator=generator).to(dtype)
            output, _ = layer(x)
            with Dispatched() as dispatched:
                output.backward(upstream)
            expected += upstream.squeeze(1).double().t() @ x.detach().squeeze(1).double()
    return layer.weight.main_grad, expected, layer.weight.grad, dispatched.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_microbatches_add_up_in_float32_without_a_rounding_in_between(dtype: torch.dtype) -> None:
    buffer, expected, grad, _ = run_ranks(accumulated, 1, dtype)[0]
    # Sums of 320 products of about one in float32; one rounding to bfloat16 alone would be off by 2^-9.
    torch.testing.assert_close(buffer.double(), expected, rtol=0, atol=320 * 2.0**-24 * expected.abs().max().item())
    assert grad is None


def test_the_product_itself_adds() -> None:
    *_, counts = run_ranks(accumulated, 1, torch.float32)[0]
    assert counts["addmm_"] == 1 and counts["mm"] == 1, "one product for the weight, one for the input"
    assert counts["add_"] == counts["add"] == 0


def passed_through(rank: int, frozen: bool) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Where MKL is narrow: (output, gradients of input and weight), the same in float64, (oneDNN's products in the
    forward, in the backward)."""
    generator = torch.Generator().manual_seed(3)
    config = ModelParallelConfig(
        gradient_accumulation_fusion=True, use_cpu_initialization=True, perform_initialization=False
    )
    with pytest.MonkeyPatch.context() as patch, megatron_scope(CPU), accumulated_weight_gradients(CPU):
        patch.setattr(gemm, "_mkl_is_narrow", lambda: True)
        patch.setattr(gemm, "ONEDNN_FROM", 1)
        patch.setattr(gemm, "ONEDNN_STEP", 8)
        layer = ColumnParallelLinear(
            WIDTH, OUT, config=config, init_method=lambda weight: None, bias=False, tp_group=dist.group.WORLD
        )
        layer.weight.requires_grad_(not frozen)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(OUT, WIDTH, generator=generator))
        layer.weight.main_grad = torch.zeros(OUT, WIDTH)
        x = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
        upstream = torch.randn(TOKENS, OUT, generator=generator)
        with Dispatched() as forward:
            output, _ = layer(x)
        with Dispatched() as backward:
            output.backward(upstream)
        assert x.grad is not None
        wide, weight = upstream.double(), layer.weight.detach().double()
        expected = [x.detach().double() @ weight.t(), wide @ weight, wide.t() @ x.detach().double() * (not frozen)]
    calls = [dispatched.counts["_linear_pointwise"] for dispatched in (forward, backward)]
    return [output.detach(), x.grad, layer.weight.main_grad], expected, calls


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("frozen", [True, False])
def test_a_layers_output_and_weight_gradient_are_onednns_products_where_mkl_is_narrow(frozen: bool) -> None:
    found, expected, calls = run_ranks(passed_through, 1, frozen)[0]
    for one, exact in zip(found, expected, strict=True):
        # Sums of at most 40 products of about one in float32.
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=40 * 2.0**-24 * 40)
    assert calls == [1, 0 if frozen else 1]


def test_megatrons_names_are_as_they_were_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, NAMES[0], False)
    monkeypatch.setattr(layers, NAMES[1], None, raising=False)
    with pytest.raises(ZeroDivisionError), accumulated_weight_gradients(CPU):
        assert layers._grad_accum_fusion_available
        raise ZeroDivisionError
    assert [getattr(layers, name) for name in NAMES] == [False, None]
    assert layers.F is torch.nn.functional and layers.torch is torch


def embedded(rank: int, tp: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Counter[str]]:
    """(this rank's buffer after some microbatches, the same in float64, .grad, operations of the last backward)."""
    generator = torch.Generator().manual_seed(2)
    config = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype)
    with megatron_scope(CPU), accumulated_weight_gradients(CPU):
        layer = VocabParallelEmbedding(
            OUT, WIDTH, init_method=lambda weight: None, config=config, tp_group=dist.group.WORLD
        )
        rows = OUT // tp
        with torch.no_grad():
            layer.weight.copy_(torch.randn(OUT, WIDTH, generator=generator)[rank * rows : (rank + 1) * rows])
        layer.weight.main_grad = torch.ones(rows, WIDTH)
        expected = torch.ones(OUT, WIDTH, dtype=torch.float64)
        for _ in range(MICROBATCHES):
            ids = torch.randint(OUT, (1, TOKENS), generator=generator)
            upstream = torch.randn(1, TOKENS, WIDTH, generator=generator).to(dtype)
            output = layer(ids)
            with Dispatched() as dispatched:
                output.backward(upstream)
            for i in range(TOKENS):
                expected[ids[0, i]] += upstream[0, i].double()
    expected = expected[rank * rows : (rank + 1) * rows]
    assert layer.weight.grad_added_to_main_grad
    return layer.weight.main_grad, expected, layer.weight.grad, dispatched.counts


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_an_embedding_are_added_where_they_belong_and_no_table_is_filled(dtype: torch.dtype, tp: int) -> None:
    for buffer, expected, _, counts in run_ranks(embedded, tp, tp, dtype):
        # Each row is the sum of at most 8 x 40 numbers of about one.
        torch.testing.assert_close(buffer.double(), expected, rtol=0, atol=320 * 2.0**-24 * expected.abs().max().item())
        assert counts["index_add_"] == 1 and counts["embedding_dense_backward"] == 0


def test_an_embedding_without_a_buffer_has_a_gradient_as_ever() -> None:
    table = nn.Parameter(torch.randn(OUT, WIDTH))
    ids = torch.arange(5).repeat(2)[None]
    with accumulated_weight_gradients(CPU):
        layers.F.embedding(ids, table).sum().backward()
    assert table.grad is not None
    torch.testing.assert_close(table.grad, torch.where(torch.arange(OUT)[:, None] < 5, 2.0, 0.0).expand(OUT, WIDTH))


class Squared(torch.autograd.Function):
    """sum(w^2), whose backward adds 2 w to a buffer of the caller's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, buffer: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.buffer = buffer
        return weight.square().sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None]:
        ctx.buffer.add_(2 * upstream * ctx.saved_tensors[0])
        return None, None


def test_hooks_run_for_a_gradient_that_its_function_has_added_itself() -> None:
    trained: Any = nn.Parameter(torch.full((3, 2), 5.0))
    frozen = nn.Parameter(torch.ones(3, 2), requires_grad=False)
    trained.main_grad = torch.ones(3, 2)
    told = []
    trained.register_post_accumulate_grad_hook(lambda weight: told.append(weight.grad_added_to_main_grad))
    weights, into = adding_in_place([trained, frozen])
    assert into is not None and into[0] is trained.main_grad and into[1] is None and weights[1] is frozen
    Squared.apply(weights[0], into[0]).backward()
    assert told == [True]
    torch.testing.assert_close(trained.main_grad, torch.full((3, 2), 11.0))
    with torch.no_grad():
        assert adding_in_place([trained])[1] is None
    assert adding_in_place([frozen])[1] is None


@pytest.mark.parametrize(("device", "apex_answers"), [("cuda", True), ("cpu", False)])
def test_apex_answers_on_cuda_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, device: str, apex_answers: bool
) -> None:
    apex = SimpleNamespace()
    monkeypatch.setattr(layers, NAMES[0], True)
    monkeypatch.setattr(layers, NAMES[1], apex, raising=False)
    with accumulated_weight_gradients(torch.device(device)):
        assert (layers.fused_weight_gradient_mlp_cuda is apex) == apex_answers
    assert layers.fused_weight_gradient_mlp_cuda is apex
