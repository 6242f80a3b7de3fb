"""How far the streaming backend's logits, losses and gradients are from float64, with the gate's weights by Horner's
rule in the accumulator, as it is, and with w_j h_j rounded to 16 bits, as plain PyTorch multiplies. Needs no GPU.

    python tools/benchmarks/streaming_errors.py [--tokens 48 --vocab 32000 --width 128] [--out FILE.json]

The kernels run in Triton's interpreter, with a GPU's arithmetic (gpu_arithmetic.py): products of 16-bit operands added
up in fp32, in the kernel's order. Heads are whole, and an eighth of the vocabulary. An error is the largest one of any
number, of z and the row losses as it is, of gradients in units of the largest true number of the tensor. All but z pass
through dz, which both variants round to 16 bits, as they do the gradients of 16-bit tensors.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when it is imported

import time
from typing import Any

import torch
from benchmark import Inputs, Shape
from gpu_arithmetic import teach_gpu_arithmetic
from scripting import Parser, positive, result_file, write_json
from stored_tiles import stored_logits, weighing
from torch import Tensor

from ultrafuser_mega.ops import streaming, streaming_tiles
from ultrafuser_mega.ops.problem import checked_problem

SPECIALISTS, CAPABILITY = 3, 90
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = {"rounded operands": False, "Horner": True}
SETTINGS: dict[str, Any] = {"group": None, "vocab_start": 0, "vocab_size": None, "ignore_index": -100}
SETTINGS |= {"reduction": "none", "label_smoothing": 0.0, "z_loss": 0.0}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=positive, default=48)
    parser.add_argument("--vocab", type=positive, default=32000)
    parser.add_argument("--width", type=positive, default=128, help="of each of three specialists")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    teach_gpu_arithmetic()
    streaming_tiles.capability = lambda tensor: CAPABILITY
    records: list[dict[str, Any]] = []
    for part, vocab in (("whole", arguments.vocab), ("an eighth", max(1, arguments.vocab // 8))):
        for name, dtype in DTYPES.items():
            shape = Shape(arguments.tokens, vocab, (arguments.width,) * SPECIALISTS, dtype)
            for variant, found in errors(Inputs(shape, torch.device("cpu"))).items():
                records.append({"vocabulary": part, "dtype": name, "weights": variant} | found)
                shown = "  ".join(f"{key} {value:.1e}" for key, value in found.items() if key != "seconds")
                print(f"{part:10} {name} {variant:17} {shown}", flush=True)
            if arguments.out:
                sizes = {"tokens": arguments.tokens, "vocab": arguments.vocab, "widths": list(shape.widths)}
                write_json(arguments.out, sizes | {"errors": records})


def errors(inputs: Inputs) -> dict[str, dict[str, float]]:
    """By variant the largest errors of z, of a row's loss and of every gradient, and the seconds it took."""
    true = truth(inputs)
    tile = streaming_tiles.tile("dlogits", CAPABILITY, inputs.hidden[0].dtype, SPECIALISTS)
    found = {}
    for variant, horner in VARIANTS.items():
        begun = time.perf_counter()
        z = stored_logits(inputs.hidden, inputs.heads, inputs.gate_logits, tile, horner=horner)
        inputs.drop_gradients()
        inputs.require((True, True, True))
        with weighing(horner):
            problem = checked_problem(inputs.hidden, inputs.heads, inputs.gate_logits, inputs.target, **SETTINGS)
            loss, _ = streaming.mixture_loss(problem)
            loss.sum().backward()
        answer = {"z": z, "loss": loss.detach(), "gate": inputs.gate_logits.grad}
        answer |= {f"hidden[{j}]": states.grad for j, states in enumerate(inputs.hidden)}
        answer |= {f"heads[{j}]": head.grad for j, head in enumerate(inputs.heads)}
        found[variant] = {name: largest(value, true[name], name in ("z", "loss")) for name, value in answer.items()}
        found[variant]["seconds"] = time.perf_counter() - begun
    return found


def truth(inputs: Inputs) -> dict[str, Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in (inputs.gate_logits, *inputs.hidden, *inputs.heads)]
    gate, hidden, heads = leaves[0], leaves[1 : 1 + SPECIALISTS], leaves[1 + SPECIALISTS :]
    weights = torch.softmax(gate, 1)
    z = torch.stack([weights[:, j, None] * (hidden[j] @ heads[j].t()) for j in range(SPECIALISTS)]).sum(0)
    loss = torch.nn.functional.cross_entropy(z, inputs.target, reduction="none")
    loss.sum().backward()
    true = {"z": z.detach(), "loss": loss.detach(), "gate": gate.grad}
    true |= {f"hidden[{j}]": states.grad for j, states in enumerate(hidden)}
    true |= {f"heads[{j}]": head.grad for j, head in enumerate(heads)}
    return {name: value for name, value in true.items() if value is not None}


def largest(value: Tensor | None, true: Tensor, absolute: bool) -> float:
    assert value is not None
    error = float((value.double() - true).abs().max())
    return error if absolute else error / float(true.abs().max())


if __name__ == "__main__":
    main()
