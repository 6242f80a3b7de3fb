"""What counts as equal: no more than float32's rounding costs the model, and never NaN."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.families import write_family
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ultrafuser_mega.convert.agreement import Agreement, Comparison, check_memory, comparison_batches, rounding_cost
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import read_architecture


def forward(model: nn.Module, ids: Tensor) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.no_grad():
            return [model(input_ids=ids).logits]

    return run


def relative(ours: Tensor, theirs: Tensor) -> float:
    return Agreement.of("", ours.double(), theirs.double()).relative


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_rounding_is_tolerated_and_bf16_weights_are_not(tmp_path: Path, case: str) -> None:
    """Between float32's error against float64 and what weights rounded to bf16 do."""
    folder = write_family(tmp_path, case)
    ids = torch.randint(0, 401, (2, 48), generator=torch.Generator().manual_seed(1))
    single, double, rounded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    )
    (logits,), (exact,), (coarse,) = (forward(model, ids)() for model in (single, double, rounded.float()))
    tolerance = rounding_cost(single, [logits], forward(single, ids))
    assert 2 * relative(logits, exact) < tolerance < relative(coarse, logits) / 5


def test_rounding_costs_nothing_where_the_logits_are_nan(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan
    run = forward(model, ids)
    logits = run()
    tolerance = rounding_cost(model, logits, run)
    found = Agreement.of("real", logits[0], logits[0])
    assert not Comparison.of("a", "b", tolerance, [found]).equal
    assert not Comparison.of("a", "b", float("inf"), [found]).equal


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("both", [False, True])
def test_nan_is_different_from_everything(place: int, both: bool) -> None:
    theirs = torch.tensor([[[1.0, 2.0], [3.0, 1.0]]])
    ours = theirs.clone()
    ours[0, place, 1] = torch.nan
    found = Agreement.of("real", ours, ours if both else theirs)
    fine = Agreement.of("random", theirs, theirs)
    assert found.top1 == 0.5
    for order in ([found, fine], [fine, found]):
        assert not Comparison.of("a", "b", 1.0, order).equal
    assert not Comparison.of("a", "b", float("nan"), [fine]).equal


def test_difference_is_measured_in_parts_of_the_largest_logit() -> None:
    theirs = torch.tensor([[[30.0, -40.0]]])
    found = Agreement.of("real", theirs + 0.04, theirs)
    assert found.max_abs == pytest.approx(0.04, rel=1e-4) and found.relative == pytest.approx(0.001, rel=1e-4)
    assert Comparison.of("a", "b", 2e-3, [found]).equal and not Comparison.of("a", "b", 5e-4, [found]).equal
    zero = Agreement.of("real", torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    assert (zero.relative, zero.top1) == (0.0, 1.0)
    comparison = Comparison.of("a", "b", 1e-3, [zero])
    assert json.loads(comparison.to_json()) == json.loads(json.dumps(asdict(comparison)))


def test_text_is_cut_to_what_a_model_can_read() -> None:
    batches = comparison_batches([5, 99, 6, 7, 8, 9, 1], rows=50, positions=7, multiple=3)
    assert batches["real"].tolist() == [[5, 6, 7, 8, 9, 1]]
    assert batches["random"].shape == (4, 6) and batches["random"].max() < 50
    assert comparison_batches([5], rows=50, positions=7, multiple=3)["real"].tolist() == [[5, 5, 5]]
    with pytest.raises(InputError, match="--text: none of its tokens is in the vocabulary"):
        comparison_batches([99], rows=50, positions=7)


def test_weights_beyond_the_memory_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = read_architecture(write_family(tmp_path, "llama"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(InputError, match=r"x: comparing it takes 0\.0 GB of memory .* use a machine with more"):
        check_memory("x", [arch])
