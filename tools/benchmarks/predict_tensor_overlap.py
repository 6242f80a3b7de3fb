"""What cutting tensor-parallel collectives and the products next to them into parts would bring a 13B layer's forward.

    python tools/benchmarks/predict_tensor_overlap.py

Each of a layer's four linear maps has a gather before or a scatter behind it. In n parts a part's collective travels
under another part's product: n = 2 or 4 with NCCL, or a ring in which every rank's own part is passed on, with the
latency of a collective per message or with that of a copy engine. Arithmetic from planning/hardware.py, with what
parts of a product lose: its tiles of 128 x 256 come in waves over all multiprocessors, of which the last is not full.
"""

from __future__ import annotations

import math

from scripting import Parser
from trio_13b import llama_13b

from ultrafuser_mega.planning.hardware import GPUS, Cluster

TP, WIDTH = 8, 2  # ranks; bytes of a number
TILE, MULTIPROCESSORS = (128, 256), 132
COPY_ENGINE = 3e-6  # seconds of latency
TOKENS = (2650, 5300, 8192)


def main() -> None:
    """The command."""
    Parser(__doc__).parse_args()
    for tokens in TOKENS:
        found = forward(tokens)
        print(f"{tokens} tokens: " + ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in found.items()))


def forward(tokens: int) -> dict[str, float]:
    """Seconds of a layer's products and collectives."""
    arch, cluster = llama_13b(32000), Cluster(GPUS["h100-80g"])
    d, heads, mlp = arch.hidden_size, arch.heads * arch.head_dim // TP, arch.ffn_size // TP
    latency, bus = cluster.assumed.latency, cluster.bus(TP, 1)
    size = WIDTH * tokens * d / bus  # seconds of all of it
    total: dict[str, float] = {}
    for inner, outer in ((d, 3 * heads), (heads, d), (d, 2 * mlp), (mlp, d)):

        def product(parts: int, inner: int = inner, outer: int = outer) -> float:
            rows = tokens / parts
            rate = cluster.gpu.flops * cluster.assumed.gemm
            return 2 * rows * inner * outer / rate * max(1.0, filled(tokens, outer) / filled(rows, outer))

        ways = {"one after the other": latency + size * (TP - 1) / TP + product(1)}
        for parts in (2, 4):
            one = latency + size * (TP - 1) / TP / parts
            ways[f"{parts} parts"] = one + (parts - 1) * max(one, product(parts)) + product(parts)
        for name, delay in ((f"ring of {TP}", latency), (f"ring of {TP}, copy engines", COPY_ENGINE)):
            ways[name] = product(TP) + (TP - 1) * max(delay + size / TP, product(TP))
        total = {name: total.get(name, 0.0) + seconds for name, seconds in ways.items()}
    return total


def filled(rows: float, columns: int) -> float:
    """Share of the multiprocessors' time that a product's tiles fill."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    return tiles / (math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS)


if __name__ == "__main__":
    main()
