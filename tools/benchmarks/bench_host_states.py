"""What an update costs whose state comes from the host's memory, beside one whose state stays on the device.

    python tools/benchmarks/bench_host_states.py [--device cuda] [--parameters 500] [--out FILE.json]

Layers of bf16 weights with float32 gradients, of so many millions of parameters together. Torch's fused AdamW over all
of it, and the same in blocks that lie in the host's memory, take turns; medians of rounds, on a CPU of its time. On a
GPU also the bytes that the link moves one way per second, of which planning/hardware.py assumes 80 % of PCIe's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from scripting import Parser, positive, result_file, write_json
from torch import Tensor, nn

from ultrafuser_mega.runtime.host_states import HostStates, Updated

ROUNDS = 10
WIDTH = 4096
_GROUP: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 1e-5, "weight_decay": 0.1}
_BYTES = 12  # of a parameter's state


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parameters", type=positive, default=500, help="millions")
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    layers = max(1, arguments.parameters * 10**6 // WIDTH**2)
    variants = {"on the device": whole(layers, device), "on the host": on_host(layers, device)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds + 2):
        for name, update in variants.items():
            taken = timed(update, device)
            if number >= 2:  # warm
                seconds[name].append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    size = layers * WIDTH**2
    print(f"{size / 1e6:,.0f} million parameters on {device}")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        print(f"{name:16} {median:8.3f} s ({spread}), {median / medians['on the device']:.2f} x")
    if device.type == "cuda":
        print(f"{size * _BYTES / medians['on the host'] / 1e9:.1f} GB/s each way")
    if arguments.out:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        write_json(arguments.out, {"device": name, "parameters": size, "seconds": seconds})


def whole(layers: int, device: torch.device) -> Callable[[], None]:
    """An update of float32 copies that stay where they are, and of the weights with them."""
    weights = [torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(layers)]
    mains: list[Tensor] = [nn.Parameter(weight.float()) for weight in weights]
    for main in mains:
        main.grad = torch.full_like(main, 1e-3)
    optimizer = torch.optim.AdamW([_GROUP | {"params": mains}], fused=True)

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        torch._foreach_copy_(weights, mains)

    return update


def on_host(layers: int, device: torch.device) -> Callable[[], None]:
    """The same with what the optimizer holds in the host's memory."""
    weights = [nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16, device=device)) for _ in range(layers)]
    mains = [weight.detach().float() for weight in weights]
    for main in mains:
        main.grad = torch.full_like(main, 1e-3)
    updated = [Updated(weight, slice(None), main, _GROUP) for weight, main in zip(weights, mains, strict=True)]
    return HostStates(updated, device).update


def timed(update: Callable[[], None], device: torch.device) -> float:
    """Seconds; on a CPU those that this process had of it."""
    if device.type == "cpu":
        begun = time.process_time()
        update()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    update()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
