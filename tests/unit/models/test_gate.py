"""The gate, sharded over any number of ranks, is the two-layer MLP of the paper (eq. 1), values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.models.gate import Gate
from ultrafuser_mega.runtime.spawn import run_ranks

UNITS = 7  # over 2 and 3 ranks: padded to 8 and 9
EQUAL, DIFFERENT = {"text": 6, "code": 6, "math": 6}, {"text": 6, "code": 4, "math": 10}
ROWS = 5
# float32 sums of at most 10 products against float64: a few times 2^-24 of numbers of order one.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def states(widths: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(ROWS, width, generator=generator) for name, width in widths.items()}


def upstream(specialists: int) -> Tensor:
    return torch.randn(ROWS, specialists, generator=torch.Generator().manual_seed(4))


def run_gate(rank: int, widths: dict[str, int]) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    gate = Gate(widths, UNITS, dist.group.WORLD, torch.float32, torch.device("cpu"), seed=1)
    hidden = {name: h.requires_grad_() for name, h in states(widths).items()}
    logits = gate(hidden)
    (logits * upstream(len(widths))).sum().backward()
    return {
        "logits": logits.detach(),
        "weights": {name: p.detach() for name, p in gate.named_parameters()},
        "gradients": {name: p.grad for name, p in gate.named_parameters()},
        "hidden": {name: h.grad for name, h in hidden.items()},
    }


def join(parts: list[Tensor]) -> Tensor:
    """Shards of hidden units to the whole; the padding after the real units must be zero."""
    whole = torch.cat(parts)
    assert not whole[UNITS:].any()
    return whole[:UNITS]


def reference(widths: dict[str, int], weights: dict[str, Tensor]) -> dict[str, Any]:
    """a_j = w2 . relu(W1_j h_j + b1) in float64, for the same weights."""
    leaves = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    hidden = {name: h.double().requires_grad_() for name, h in states(widths).items()}
    columns = []
    for name, h in hidden.items():
        w1 = leaves["w1.shared" if "w1.shared" in leaves else f"w1.{name}"]
        columns.append((h @ w1.t() + leaves["b1"]).clamp(min=0) @ leaves["w2"])
    logits = torch.stack(columns, dim=1)
    (logits * upstream(len(widths)).double()).sum().backward()
    return {
        "logits": logits.detach(),
        "gradients": {name: leaf.grad for name, leaf in leaves.items()},
        "hidden": {name: h.grad for name, h in hidden.items()},
    }


@pytest.mark.parametrize("widths", [EQUAL, DIFFERENT], ids=["equal widths", "different widths"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sharded_gate_is_the_whole_mlp(ranks: int, widths: dict[str, int]) -> None:
    parts = run_ranks(run_gate, ranks, widths)
    weights = {name: join([part["weights"][name] for part in parts]) for name in parts[0]["weights"]}
    assert set(weights) == {"b1", "w2", *(["w1.shared"] if widths == EQUAL else [f"w1.{name}" for name in widths])}
    expected = reference(widths, weights)
    for part in parts:
        assert torch.equal(part["logits"], parts[0]["logits"])
        assert part["logits"].dtype == torch.float32
    torch.testing.assert_close(parts[0]["logits"].double(), expected["logits"], **TOLERANCE)
    for name, gradient in expected["gradients"].items():
        ours = join([part["gradients"][name] for part in parts])
        torch.testing.assert_close(ours.double(), gradient, **TOLERANCE)
    for name, gradient in expected["hidden"].items():  # every rank has the part of its own units
        ours = torch.stack([part["hidden"][name] for part in parts]).sum(0)
        torch.testing.assert_close(ours.double(), gradient, **TOLERANCE)


def test_initial_weights_do_not_depend_on_the_number_of_ranks() -> None:
    one, three = run_ranks(run_gate, 1, DIFFERENT), run_ranks(run_gate, 3, DIFFERENT)
    for name, weight in one[0]["weights"].items():
        assert torch.equal(weight, join([part["weights"][name] for part in three]))


def train_gate(rank: int) -> list[tuple[str, Tensor, Tensor]]:
    """(name, before, after) of every parameter over five AdamW steps with weight decay."""
    assert dist.group.WORLD is not None
    gate = Gate(EQUAL, UNITS, dist.group.WORLD, torch.float32, torch.device("cpu"), seed=1)
    before = {name: p.detach().clone() for name, p in gate.named_parameters()}
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (gate(states(EQUAL)) * upstream(3)).sum().backward()
        optimizer.step()
    return [(name, before[name], p.detach()) for name, p in gate.named_parameters()]


def test_padding_units_stay_zero_in_training() -> None:
    parts = run_ranks(train_gate, 3)
    for shards in zip(*parts, strict=True):
        before, after = join([shard[1] for shard in shards]), join([shard[2] for shard in shards])
        assert not torch.equal(before, after)
