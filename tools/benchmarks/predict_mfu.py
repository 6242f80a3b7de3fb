"""What the cost model predicts for three Llama-2-13B models on H100s: today's program, and each saving it lacks on top.

    python tools/benchmarks/predict_mfu.py --out docs/benchmarks/predicted_mfu.json

Arithmetic (ultrafuser_mega/planning); nothing runs on a GPU. Believe ratios, not digits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scripting import Parser, result_file, write_json
from trio_13b import ROWS, plan_13b

from ultrafuser_mega.planning.cost import Program
from ultrafuser_mega.planning.hardware import GIB, GPUS, Cluster
from ultrafuser_mega.planning.microbatch import GlobalBatch, Workload
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.step_time import StepEstimate, estimate


@dataclass(frozen=True)
class Case:
    """A layout and a batch of equal samples.

    ``bar``: the MFU that is asked of it, None where it is shown for comparison; ``response``: tokens of a sample.
    """

    title: str
    layout: dict[str, Any]
    samples: int
    length: int
    response: int
    microbatch_tokens: int
    bar: float | None


#: Layouts that ``ultrafuser plan --gpus`` ranks high and that leave some GiB free. 221 tokens, 150 of them response,
#: are about the means of the instruction data that docs/performance.md packs.
CASES = (
    Case("16 GPUs, 96 short samples", {"tp": 8, "dp": 2}, 96, 221, 150, 8192, 0.36),
    Case("16 GPUs, 96 samples of 2048", {"tp": 4, "pp": 4}, 96, 2048, 1536, 4096, 0.42),
    Case("512 GPUs, 3072 samples of 2048", {"tp": 4, "pp": 2, "dp": 64}, 3072, 2048, 1536, 8192, 0.40),
    Case("16 GPUs at tp 8, 96 samples of 2048", {"tp": 8, "dp": 2}, 96, 2048, 1536, 6144, None),
    Case("512 GPUs at tp 8, 3072 samples of 2048", {"tp": 8, "dp": 64}, 3072, 2048, 1536, 8192, None),
)

TODAY = "+ weights gathered under the forward (today)"

#: Each on top of those before it.
PROGRAMS = {
    "packing, known shapes, fused AdamW": Program(
        fused_nodes=False, fused_weight_gradients=False, gradient_overlap=False, weight_overlap=False
    ),
    "+ one kernel per elementwise node": Program(
        fused_weight_gradients=False, gradient_overlap=False, weight_overlap=False
    ),
    "+ weight gradients added by their products": Program(gradient_overlap=False, weight_overlap=False),
    "+ replicas' gradients summed under the backward": Program(weight_overlap=False),
    TODAY: Program(),
    "+ tensor-parallel traffic under products": Program(tensor_overlap=True),
}


def plan_of(case: Case) -> RunPlan:
    """The trio under the case's layout, in bf16 with sequence parallelism and the distributed optimizer."""
    stage = {"steps": 1, "samples_per_class": max(1, case.samples // 3), "lr": 2e-5}
    layout = {"kind": "colocated", **case.layout}
    return plan_13b(layout, microbatch_tokens=case.microbatch_tokens, stage1=stage, stage2=stage)


def predict(case: Case, program: Program) -> StepEstimate:
    """A step of the case."""
    lengths = dict.fromkeys(ROWS, np.full(case.samples, case.length))
    batch = GlobalBatch(lengths, np.full(case.samples, case.response))
    work = Workload((batch,), case.microbatch_tokens, "")
    return estimate(plan_of(case), work, Cluster(GPUS["h100-80g"]), program=program)


def show(case: Case, steps: dict[str, StepEstimate]) -> None:
    """The table of a case."""
    memory = steps[TODAY].memory
    asked = "" if case.bar is None else f", asked: {case.bar:.0%}"
    table = Table(title=f"{case.title}, {case.layout}{asked}", title_justify="left")
    table.add_column("program")
    for column in ("s/step", "MFU", "idle"):
        table.add_column(column, justify="right")
    for name, step in steps.items():
        table.add_row(name, f"{step.seconds:.2f}", f"{step.mfu:.1%}", f"{step.idle:.0%}")
    phases = ", ".join(f"{phase} {held / GIB:.1f} GiB" for phase, held in memory.phases.items())
    table.caption = f"most that a rank holds: {phases}"
    Console().print(table)


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=result_file, help="also write the rows there, as JSON")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        steps = {name: predict(case, program) for name, program in PROGRAMS.items()}
        show(case, steps)
        for name, step in steps.items():
            figures = {"seconds": step.seconds, "mfu": step.mfu, "idle": step.idle, "parts": dict(step.parts)}
            rows.append({**asdict(case), "program": name, **figures, "memory": step.memory.phases})
    if arguments.out:
        write_json(arguments.out, {"gpu": "h100-80g", "rows": rows})


if __name__ == "__main__":
    main()
