"""Both stages of a whole run written a second time in float64: schedule, clipping, AdamW, which weights decay.

Shares no code with the package but the samples (see reference_fuser.py): AdamW is written out from its paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GATE = ("w1", "b1", "w2")


@dataclass
class ReferenceAdamW:
    """Decoupled weight decay (Loshchilov and Hutter, algorithm 2) over named float64 leaves, changed in place."""

    weights: Mapping[str, Tensor]
    options: Mapping[str, Any]  # the configuration's ``optimizer``
    steps: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def step(self, rate_of: Callable[[str], float], decay_of: Callable[[str], float] | None = None) -> float:
        """Clip by the norm of all gradients, decay, update; returns the norm before clipping.

        Args:
            rate_of: a weight's name -> its rate.
            decay_of: the same of its decay, if it is a matrix; default: ``weight_decay``.
        """
        o = self.options
        gradients = {name: w.grad if w.grad is not None else torch.zeros_like(w) for name, w in self.weights.items()}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        scale = min(1.0, o["clip_grad"] / norm)
        self.steps += 1
        for name, weight in self.weights.items():
            g = scale * gradients[name]
            m = self.first[name] = o["beta1"] * self.first.get(name, 0.0) + (1 - o["beta1"]) * g
            v = self.second[name] = o["beta2"] * self.second.get(name, 0.0) + (1 - o["beta2"]) * g * g
            m, v = m / (1 - o["beta1"] ** self.steps), v / (1 - o["beta2"] ** self.steps)
            decay = (decay_of(name) if decay_of else o["weight_decay"]) if is_matrix(name) else 0.0
            weight.data -= rate_of(name) * (m / (v.sqrt() + o["eps"]) + decay * weight.data)
            weight.grad = None
        return norm


def is_matrix(name: str) -> bool:
    """Everything but norms and biases, by the names of Hugging Face's Llama and of the paper's gate."""
    return "norm" not in name and not name.endswith(("bias", "b1"))


def rate(stage: Mapping[str, Any], k: int) -> float:
    """The rate of step k = 1, 2, ... of a stage with a cosine schedule."""
    n = stage["warmup_steps"]
    if k <= n:
        return float(stage["lr"] * k / n)
    peak = max(n, 1)
    half_turn = (k - peak) / (stage["steps"] - peak + 1)
    return float(stage["min_lr"] + (stage["lr"] - stage["min_lr"]) * (1 + math.cos(math.pi * half_turn)) / 2)


def reference_stage(
    weights: Mapping[str, Tensor],
    stage: Mapping[str, Any],
    options: Mapping[str, Any],
    loss_of_step: Callable[[int], Tensor],
) -> list[dict[str, float]]:
    """Train ``weights`` for one stage; every step's loss before it, rates, and gradient norm."""
    adam, records = ReferenceAdamW(weights, options), []
    for k in range(1, stage["steps"] + 1):
        loss = loss_of_step(k - 1)
        loss.backward()
        lr = rate(stage, k)
        gate_lr = lr * stage.get("gate_lr", stage["lr"]) / stage["lr"]
        norm = adam.step(lambda name, lr=lr, gate_lr=gate_lr: gate_lr if name in GATE else lr)  # type: ignore[misc]
        records.append({"loss": loss.item(), "lr": lr, "gate_lr": gate_lr, "grad_norm": norm})
    return records
