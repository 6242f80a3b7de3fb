"""Cases, the float64 truth and plain PyTorch's answer: what the tests and the benchmark measure the backends against.

The truth is the closed form of loss.py's equations and of their derivatives (statistics.py) in float64, written without
autograd and without the code under test. Not imported by the operator itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from peers import plain_loss
from torch import Tensor

IGNORE = -100
MANY_ROWS = 64  # average over so many that one draw of their roundings tells their size


@dataclass(frozen=True)
class Case:
    """Inputs of one call; no tensor requires a gradient. ``options`` are keyword arguments of the loss."""

    hidden: list[Tensor]  # n x (N, d_j)
    heads: list[Tensor]  # n x (V_local, d_j)
    gate_logits: Tensor  # (N, n)
    target: Tensor  # (N,)
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)


@dataclass(frozen=True)
class Answer:
    loss: Tensor  # () or (N,)
    gate: Any  # Tensor (N, n); None where it was not asked for
    hidden: list[Any]  # n x Tensor (N, d_j), likewise
    heads: list[Any]  # n x Tensor (V_local, d_j), likewise

    def gradients(self) -> dict[str, Tensor]:
        named: dict[str, Tensor | None] = {"gate": self.gate}
        named |= {f"hidden[{j}]": value for j, value in enumerate(self.hidden)}
        named |= {f"heads[{j}]": value for j, value in enumerate(self.heads)}
        return {name: value for name, value in named.items() if value is not None}


def make_case(
    seed: int,
    *,
    rows: int,
    vocab: int,
    widths: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    ignored: float = 0.2,
    logit_scale: float = 3.0,
    gate_scale: float = 1.0,
    common_offset: float = 0.0,
    padding: int = 0,
    **options: Any,
) -> Case:
    """A random case whose logits have about ``logit_scale`` standard deviation around ``common_offset``.

    The numbers are drawn in float64 on the CPU and rounded, so every dtype and device sees the same case. ``padding``
    more head rows than ``vocab`` are appended, filled with large numbers that must not be seen.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden = [normal(rows, d) for d in widths]
    heads = [normal(vocab, d) * (logit_scale / d**0.5) for d in widths]
    if common_offset:  # the first hidden unit carries it: the gate's weights sum to 1
        root = abs(common_offset) ** 0.5
        for states, head in zip(hidden, heads, strict=True):
            states[:, 0] = root
            head[:, 0] = common_offset / root
    heads = [torch.cat((head, torch.full((padding, head.shape[1]), 99.0, dtype=torch.float64))) for head in heads]
    target = torch.randint(0, vocab, (rows,), generator=draw)
    target[torch.rand(rows, generator=draw, dtype=torch.float64) < ignored] = IGNORE
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        [states.to(dtype).to(device) for states in hidden],
        [head.to(dtype).to(device) for head in heads],
        (normal(rows, len(widths)) * gate_scale).to(wide).to(device),
        target.to(device),
        {"vocab_size": vocab, **options},
    )


def upstream_of(case: Case) -> Tensor:
    """An upstream gradient that no shortcut survives: not 1, and different per row for reduction="none"."""
    wide = case.gate_logits.dtype
    if case.options.get("reduction", "mean") == "none":
        return torch.linspace(0.5, 1.5, case.target.shape[0], dtype=wide).to(case.target.device)
    return torch.tensor(1.25, dtype=wide, device=case.target.device)


class Roundings:
    """Draws errors as large as matrix products in fp32 may have in ANY order of summation; the same in every run.

    An order of summation is a tree of n - 1 additions. Each errs by at most u = 2^-24 of its partial sum, and no
    partial sum exceeds T, the sum of the terms' absolute values. What follows has two parts, and a BLAS may cost both:

    - Roundings are as good as random: uniform in [-u, u] and independent, so each has the variance u^2 / 3 and the
      sum's standard deviation is at most u sqrt(n / 3) T in every tree. (Higham and Mary, A new approach to
      probabilistic rounding error analysis, 2019, assume less and find sqrt(n) u T times a small constant.) The
      rounding of the products themselves costs no more than one addition more.
    - But a term below u T may be lost entirely, and all such terms are where one accumulator takes word after word
      (MKL's code for any processor does). These losses are no accident, so they add up with their signs.

    The certain bound is n u T, far above both. Where terms repeat, their roundings repeat, too, and only it holds.

    Where inputs have 16 bits, what plain PyTorch keeps in that ``dtype`` is rounded to it: the logits of every head,
    what flows back into them, and the gradients. (Over 60 cases the errors that follow are as large as plain PyTorch's
    own, 0.90 to 1.05 times; a single draw of either may be a third of another.)
    """

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._draw = torch.Generator(device).manual_seed(seed)
        self._eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0

    def kept(self, exact: Tensor) -> Tensor:
        """``exact``, rounded to the 16 bits of the inputs' type up or down by chance; as it is where they have more."""
        if not self._eps:
            return exact
        mantissa = torch.frexp(exact).mantissa.abs()  # in [1/2, 1), or 0
        spacing = torch.where(mantissa > 0, exact.abs() / mantissa, 0.0) * (self._eps / 2)
        draw = torch.rand(exact.shape, generator=self._draw, dtype=exact.dtype, device=exact.device)
        return exact + spacing * (draw - 0.5)

    def of(self, exact: Tensor, terms: int, size: Tensor) -> Tensor:
        """``exact`` (...), sums of so many ``terms`` of ``size`` (...) each (T), with random errors."""
        normal = torch.randn(exact.shape, generator=self._draw, dtype=exact.dtype, device=exact.device)
        return exact + normal * size * (2.0**-24 * ((terms + 1) / 3) ** 0.5)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a (M, K) b (K, P), with random errors, and without the terms that are too small for their row of a."""
        size = a.abs()
        held = size >= 2.0**-24 * size.sum(1, keepdim=True)
        return self.of(torch.where(held, a, 0.0) @ b, a.shape[1], size @ b.abs())


def truth(case: Case) -> Answer:
    """Loss and all gradients under upstream_of(case), in float64 from the closed form."""
    return closed_form(case)[0]


def closed_form(case: Case, roundings: Roundings | None = None) -> tuple[Answer, dict[str, Tensor]]:
    """(loss and gradients; the row losses (N,) and the gate gradient (N, n) of exact products with dz).

    With ``roundings`` not the truth, but what is left of it in fp32.
    """
    options = case.options
    eps, lam = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    reduction = options.get("reduction", "mean")
    vocab = options["vocab_size"]
    kept = case.target != IGNORE
    hidden = [states.double() for states in case.hidden]
    heads = [head.double()[:vocab] for head in case.heads]
    weights = torch.softmax(case.gate_logits.double(), 1)  # (N, n)
    inputs = [weights[:, j, None] * states for j, states in enumerate(hidden)]  # n x (N, d_j): x_j
    logits = torch.stack([states @ head.t() for states, head in zip(hidden, heads, strict=True)], 1)  # (N, n, V)
    if roundings is not None:
        logits = roundings.kept(logits)
    z = (weights[:, None] @ logits).squeeze(1)  # (N, V)
    if roundings is not None:
        sizes = torch.stack([x.abs() @ head.abs().t() for x, head in zip(inputs, heads, strict=True)]).sum(0)
        z = roundings.of(z, sum(states.shape[1] for states in hidden), sizes)
    lse = torch.logsumexp(z, 1)
    onehot = F.one_hot(case.target.clamp(min=0), vocab).double()
    z_y = (z * onehot).sum(1)
    rows = (1 - eps) * (lse - z_y) + eps * (lse - z.mean(1)) + lam * lse.square()
    rows = torch.where(kept, rows, 0.0)
    factor = upstream_of(case).double() * kept  # dL/drow
    if reduction == "mean":
        factor = factor / max(1, int(kept.sum()))
    softmax = torch.exp(z - lse[:, None])
    dz = factor[:, None] * (softmax * (1 + 2 * lam * lse)[:, None] - (1 - eps) * onehot - eps / vocab)  # (N, V)
    kept_of, product = (lambda exact: exact, torch.matmul) if roundings is None else (roundings.kept, roundings.product)
    dx = [product(kept_of(dz), head) for head in heads]
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / max(1, int(kept.sum()))}[reduction]
    padded = [torch.zeros_like(head, dtype=torch.float64) for head in case.heads]
    for out, x in zip(padded, inputs, strict=True):
        out[:vocab] = kept_of(product(kept_of(dz).t(), x))
    gates = []
    by_inputs = torch.stack([(states * d).sum(1) for states, d in zip(hidden, dx, strict=True)], 1)  # (N, n)
    for dw in (by_inputs, (logits @ dz[:, :, None]).squeeze(2)):
        # Not w_j (dw_j - sum_k w_k dw_k), of which even float64 leaves nothing where one weight is next to 1.
        apart = dw[:, :, None] - dw[:, None, :]
        gates.append((weights[:, :, None] * weights[:, None, :] * apart).sum(2))
    answer = Answer(loss, gates[0], [kept_of(weights[:, j, None] * d) for j, d in enumerate(dx)], list(padded))
    return answer, {"rows": rows, "gate alone": gates[1]}


def answer_of(
    loss_function: Any, case: Case, needs: tuple[bool, bool, bool] = (True, True, True), **more: Any
) -> Answer:
    """Loss and gradients of ``loss_function`` on ``case``; needs: gate, hidden, heads."""
    gate = case.gate_logits.clone().requires_grad_(needs[0])
    hidden = [states.clone().requires_grad_(needs[1]) for states in case.hidden]
    heads = [head.clone().requires_grad_(needs[2]) for head in case.heads]
    loss = loss_function(hidden, heads, gate, case.target, **case.options, **more)
    if any(needs):
        loss.backward(upstream_of(case).to(loss.dtype))
    return Answer(loss.detach(), gate.grad, [states.grad for states in hidden], [head.grad for head in heads])


def gradient_of(tensor: Tensor) -> Tensor:
    """tensor.grad, which is there."""
    assert tensor.grad is not None
    return tensor.grad


def rule_violations(answer: Answer, case: Case, *, gate_alone: bool = False) -> list[str]:
    """Where ``answer`` is further from the truth than the rule allows; [] is a pass."""
    return Rule(case).violations(answer, gate_alone=gate_alone)


class Rule:
    """How far from the truth of ``case`` an answer may be: QuACK's rule, made to hold for any order of summation.

    Loss error at most 3 e + 1e-5, gradient errors at most 2 e + 1e-4, where e is the larger one of plain PyTorch's
    error in the same type and of what its products in any order, and its roundings to 16 bits if drawn anew, cost
    (Roundings, carried through the equations of truth). Plain PyTorch alone is no yardstick where sums cancel: with a
    common offset of 1e6 the processor's BLAS decides how much of them is left, in plain PyTorch as in the answer. The
    constants cover what either gets exact by luck. The yardstick of a scalar loss is the error of the row losses it is
    made of, because in a sum errors cancel by luck, too.
    """

    def __init__(self, case: Case) -> None:
        self.expected, more = closed_form(case)
        true = self.expected.gradients() | {"loss": more["rows"], "gate alone": more["gate alone"]}
        plain = answer_of(plain_loss, case).gradients()
        plain |= {"gate alone": plain["gate"]}
        plain |= {"loss": answer_of(plain_loss, case.with_options(reduction="none"), (False, False, False)).loss}
        candidates = [plain]
        for seed in range(1 if case.target.shape[0] >= MANY_ROWS else 3):
            rounded, more = closed_form(case, Roundings(seed, case.target.device, case.hidden[0].dtype))
            candidates.append(rounded.gradients() | {"loss": more["rows"], "gate alone": more["gate alone"]})
        errors = {
            name: max(relative_error(values[name], value) for values in candidates) for name, value in true.items()
        }
        self.allowed = {name: 2 * error + 1e-4 for name, error in errors.items()} | {"loss": 3 * errors["loss"] + 1e-5}

    def violations(self, answer: Answer, *, gate_alone: bool = False) -> list[str]:
        """One line per value that is too far away; [] is a pass.

        ``gate_alone`` is for answers whose gate gradient comes from deviations (statistics.py) and not from
        dx_j = dz W_j: what all logits have in common stands in none of its terms, so it may cost no more than rounding
        the logits does.
        """
        allowed = self.allowed | ({"gate": self.allowed["gate alone"]} if gate_alone else {})
        expected = {"loss": self.expected.loss} | self.expected.gradients()
        found = {"loss": answer.loss} | answer.gradients()
        errors = {name: relative_error(value, expected[name]) for name, value in found.items()}
        return [
            f"{name}: error {error:.3g} > {allowed[name]:.3g}"
            for name, error in errors.items()
            if not error <= allowed[name]
        ]


def relative_error(value: Tensor, true: Tensor) -> float:
    """||value - true|| / ||true||, or ||value|| where the truth is zero. NaN if anything is NaN."""
    value, true = value.detach().double().cpu(), true.detach().double().cpu()
    scale = float(true.norm()) if true.numel() else 0.0
    return float((value - true).norm()) / (scale or 1.0)
