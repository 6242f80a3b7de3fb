"""Is every backend of the loss right on this device, and the same to the bit twice? Every type, tiny and goal shapes.

    python tools/benchmarks/check_values.py --device cuda --out FILE.json

The truth is the definition in float64. As in the tests, a backend may be at most 3 x (loss) or 2 x (gradients) as far
from it as plain PyTorch in the backend's own type, plus 1e-5 or 1e-4. Every case is one record, written as it ends;
exit code 1 if one is wrong. On a CPU the goal's shape shrinks to one that takes a moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from benchmark import Inputs, Shape
from peers import plain_loss
from scripting import Parser, result_file, write_json
from torch import Tensor

from ultrafuser_mega.ops import mixture_cross_entropy

EVERYTHING, GATE = (True, True, True), (True, False, False)  # gate, hidden states, heads
CASES = (
    ("chunked", EVERYTHING),
    ("gate_only", GATE),
    ("chunked", GATE),
    ("streaming", EVERYTHING),
    ("streaming", GATE),
    ("reference", EVERYTHING),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TINY = {
    "tiny": Shape(37, 333, (64, 128, 96), torch.float32),
    "unaligned": Shape(37, 333, (33, 50), torch.float32),
}
GOAL = {"cuda": Shape(8192, 32000, (5120,) * 3, torch.float32), "cpu": Shape(256, 1000, (64,) * 3, torch.float32)}
TRUTH_ROWS = 1024  # at a time in float64
Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """What an answer of one type may be off by, relative to the norm of the truth."""

    truth: Answer
    allowed: dict[str, float]

    def errors(self, answer: Answer) -> dict[str, float]:
        return {name: relative_error(value, self.truth[name]) for name, value in answer.items()}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda: PyTorch finds no CUDA device; use cpu")
    records: list[dict[str, Any]] = []
    for record in check(torch.device(arguments.device), TINY | {"goal": GOAL[arguments.device]}):
        records.append(record)
        worst = max(record["errors"].items(), key=lambda item: item[1] / record["allowed"][item[0]], default=("", 0.0))
        print(f"{record['shape']:10} {record['dtype']:9} {record['case']:22} {record['outcome']:12} "
              f"worst {worst[0]} {worst[1]:.2e} {record.get('failed', '')}")  # fmt: skip
        if arguments.out:
            write_json(arguments.out, {"device": arguments.device, "cases": records})
    wrong = [record for record in records if record["outcome"] not in ("right", "not here")]
    print(f"{len(records) - len(wrong)} of {len(records)} cases right or not for this device")
    if wrong:
        raise SystemExit(1)


def check(device: torch.device, shapes: dict[str, Shape]) -> Iterator[dict[str, Any]]:
    """One record per shape, type, backend and set of gradients."""
    for name, shape in shapes.items():
        for dtype in DTYPES:
            inputs = Inputs(replace(shape, dtype=dtype), device)
            rule = rule_of(inputs)
            for backend, needs in CASES:
                if backend == "reference" and name == "goal":  # the definition is what the small shapes check
                    continue
                record = {
                    "shape": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "case": f"{backend}, {'everything' if needs == EVERYTHING else 'gate'}",
                    "allowed": rule.allowed,
                }
                yield record | outcome(inputs, backend, needs, rule)


def outcome(inputs: Inputs, backend: str, needs: tuple[bool, bool, bool], rule: Rule) -> dict[str, Any]:
    if backend == "streaming" and inputs.device.type == "cpu":
        return {"outcome": "not here", "errors": {}}
    begun = time.perf_counter()
    try:
        first, second = (answer_of(inputs, backend, needs) for _ in range(2))
        same = all(torch.equal(value, second[name]) for name, value in first.items())
        errors = rule.errors(first)
    except Exception as error:  # a kernel that does not compile or launch: the other cases shall be checked
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return {"outcome": "failed", "errors": {}, "failed": text}
    right = all(error <= rule.allowed[name] for name, error in errors.items())
    found = "right" if right and same else "other bits" if right else "WRONG"
    return {"outcome": found, "errors": errors, "same_bits": same, "seconds": time.perf_counter() - begun}


def answer_of(inputs: Inputs, backend: str, needs: tuple[bool, bool, bool]) -> Answer:
    inputs.drop_gradients()
    inputs.require(needs)
    loss = mixture_cross_entropy(inputs.hidden, inputs.heads, inputs.gate_logits, inputs.target, backend=backend)
    loss.backward()
    return named(loss, inputs)


def named(loss: Tensor, inputs: Inputs) -> Answer:
    found = {"gate": inputs.gate_logits.grad}
    found |= {f"hidden[{j}]": states.grad for j, states in enumerate(inputs.hidden)}
    found |= {f"heads[{j}]": head.grad for j, head in enumerate(inputs.heads)}
    return {"loss": loss.detach()} | {name: value for name, value in found.items() if value is not None}


def rule_of(inputs: Inputs) -> Rule:
    """The truth, and how far from it plain PyTorch is in the inputs' type."""
    true, true_rows = truth(inputs)
    inputs.drop_gradients()
    inputs.require(EVERYTHING)
    arguments = (inputs.hidden, inputs.heads, inputs.gate_logits, inputs.target)
    loss = plain_loss(*arguments, vocab_size=inputs.shape.vocab)
    loss.backward()
    plain = named(loss, inputs)
    with torch.no_grad():
        rows = plain_loss(*arguments, vocab_size=inputs.shape.vocab, reduction="none")
    allowed = {name: 2 * relative_error(value, true[name]) + 1e-4 for name, value in plain.items()}
    allowed["loss"] = 3 * relative_error(rows, true_rows) + 1e-5  # errors of rows cancel in a mean, by luck
    return Rule(true, allowed)


def truth(inputs: Inputs) -> tuple[Answer, Tensor]:
    """The definition's loss and gradients in float64, and every row's loss."""
    heads = [head.detach().double().requires_grad_() for head in inputs.heads]
    losses: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    tokens = inputs.shape.tokens
    for start in range(0, tokens, TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        leaves = [t[rows].detach().double().requires_grad_() for t in (inputs.gate_logits, *inputs.hidden)]
        loss = plain_loss(leaves[1:], heads, leaves[0], inputs.target[rows], vocab_size=inputs.shape.vocab,
                          reduction="none")  # fmt: skip
        (loss.sum() / tokens).backward()
        losses.append(loss.detach())
        for name, leaf in zip(["gate", *(f"hidden[{j}]" for j in range(len(heads)))], leaves, strict=True):
            assert leaf.grad is not None
            parts.setdefault(name, []).append(leaf.grad)
    every_row = torch.cat(losses)
    answer = {"loss": every_row.mean()} | {name: torch.cat(values) for name, values in parts.items()}
    answer |= {f"heads[{j}]": head.grad for j, head in enumerate(heads) if head.grad is not None}
    return answer, every_row


def relative_error(value: Tensor, true: Tensor) -> float:
    """||value - true|| / ||true||; inf where something is not a number."""
    error = float((value.detach().double() - true).norm() / true.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


if __name__ == "__main__":
    main()
