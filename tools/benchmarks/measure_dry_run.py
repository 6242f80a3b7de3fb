"""What a layer costs a rank of a 13B trio, counted by the dry run on fake CUDA tensors; no GPU, a C++ compiler.

Two depths and two numbers of microbatches are run; differences give what one decoder layer of one specialist adds to a
microbatch: dispatched operations (collectives apart), and bytes that its backward needs per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from scripting import Parser, result_file, write_json

from ultrafuser_mega.dry_run.fake_cuda import load_fake_cuda
from ultrafuser_mega.runtime.quiet import quiet_dependencies

DEPTHS = (4, 8)
MICROBATCHES = (1, 3)
TOKENS = 2048


@dataclass(frozen=True)
class Case:
    """A colocated layout; the rank that is played; layers of a specialist's stage are depth / pp."""

    title: str
    layout: Mapping[str, Any]
    rank: int


CASES = (Case("tp 8 dp 2", {"tp": 8, "dp": 2}, 0), Case("tp 8 pp 4, last stage", {"tp": 8, "pp": 4}, 24))


def measure(case: Case) -> dict[str, Any]:
    """The case's row."""
    import torch
    from trio_13b import plan_13b

    from ultrafuser_mega.dry_run.formula import predictions
    from ultrafuser_mega.dry_run.rehearse import rehearse
    from ultrafuser_mega.reporting.rehearsal import Part

    plan = plan_13b({"kind": "colocated", **case.layout}, microbatch_tokens=TOKENS)
    stages = case.layout.get("pp", 1)
    found: dict[tuple[int, int], Part] = {}
    row: dict[str, Any] = {"case": case.title}
    for depth in DEPTHS:
        deep = replace(
            plan, architectures={name: replace(arch, layers=depth) for name, arch in plan.architectures.items()}
        )
        for count in MICROBATCHES:
            rehearsal = rehearse(deep, case.rank, torch.device("cuda", 0), microbatches=count)
            parts = {part.name: part for part in rehearsal.parts}
            found[depth, count] = parts["stage 2"]
            formula = predictions(deep, rehearsal, "cuda")
            row[f"{depth} layers, {count} microbatches"] = {
                name: {
                    "peak_bytes": part.peak_bytes,
                    "formula_bytes": formula[rehearsal.rank, name].peak,
                    "by_kind": part.peak,
                    "waits": part.waits,
                }
                for name, part in parts.items()
                if name != "evaluation"
            }
    layers = 3 * (DEPTHS[1] - DEPTHS[0]) / stages

    def operations(part: Part) -> int:
        return sum(count for name, count in part.operations.items() if not name.startswith("c10d"))

    def per_microbatch(depth: int) -> float:
        few, many = (operations(found[depth, count]) for count in MICROBATCHES)
        return (many - few) / (MICROBATCHES[1] - MICROBATCHES[0])

    def kept(depth: int) -> int:
        return found[depth, 1].peak["activations"]

    row["operations per layer and microbatch"] = (per_microbatch(DEPTHS[1]) - per_microbatch(DEPTHS[0])) / layers
    row["activation bytes per token and layer"] = (kept(DEPTHS[1]) - kept(DEPTHS[0])) / layers / TOKENS
    row["waits of the host per step"] = max(sum(part.waits.values()) for part in found.values())
    return row


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=result_file, help="also write the rows there, as JSON")
    arguments = parser.parse_args()
    quiet_dependencies()
    load_fake_cuda()
    rows = [measure(case) for case in CASES]
    for row in rows:
        print(row["case"])
        for key, value in row.items():
            if isinstance(value, int | float):
                print(f"  {key}: {value:.1f}")
            elif isinstance(value, dict):
                peak, formula = (value["stage 2"][which] / 2**30 for which in ("peak_bytes", "formula_bytes"))
                print(f"  {key}: peak {peak:.2f} GiB, formula {formula:.2f}")
    if arguments.out:
        write_json(arguments.out, {"tokens": TOKENS, "rows": rows})


if __name__ == "__main__":
    main()
