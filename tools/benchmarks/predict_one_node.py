"""What three Llama-2-13B models take on ONE node of 8 GPUs of 80 GB, by what trains: memory by kind, seconds a step.

    python tools/benchmarks/predict_one_node.py --out docs/benchmarks/predicted_one_node.json

Arithmetic (ultrafuser_mega/planning), of the best layout that ``plan --gpus 8`` finds; nothing runs on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scripting import Parser, result_file, write_json
from trio_13b import ROWS, plan_13b

from ultrafuser_mega.planning.hardware import GIB, GPUS, Cluster
from ultrafuser_mega.planning.host_memory import host_memory
from ultrafuser_mega.planning.layouts import Candidate, layout_entry, ranked
from ultrafuser_mega.planning.microbatch import GlobalBatch, Workload
from ultrafuser_mega.planning.step_time import estimate

LENGTH, RESPONSE, SAMPLES, MICROBATCH = 2048, 1536, 96, 8192
GPUS_OF_NODE = 8
_LORA = {"rank": 16, "alpha": 32}
#: Title -> (stage, what it trains, where the optimizer's state lies).
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "stage 1: gate": (1, {}, "device"),
    "stage 1: gate and heads": (1, {"heads": "full"}, "device"),
    "stage 2: adapters of rank 16, gate": (2, {"heads": "frozen", "specialists": "lora"}, "device"),
    "stage 2: adapters of rank 16, gate, heads": (2, {"specialists": "lora"}, "device"),
    "stage 2: everything, state on the device": (2, {}, "device"),
    "stage 2: everything, state on the host": (2, {}, "host"),
}


def best(stage: int, train: dict[str, Any], state: str) -> Candidate:
    """The best layout of the node, as configured: what would make another fit is not applied."""
    config = {"steps": 100, "samples_per_class": SAMPLES // 3, "lr": 2e-5, "train": train}
    layout = {"kind": "colocated", "tp": GPUS_OF_NODE}
    changes = {"lora": _LORA, "optimizer": {"state": state}, f"stage{stage}": config}
    plan = plan_13b(layout, microbatch_tokens=MICROBATCH, **changes)
    batch = GlobalBatch(dict.fromkeys(ROWS, np.full(SAMPLES, LENGTH)), np.full(SAMPLES, RESPONSE))
    work = Workload((batch,), MICROBATCH, "")
    node = Cluster(GPUS["h100-80g"], GPUS_OF_NODE)
    found = ranked(plan, work, node, GPUS_OF_NODE, stage=stage)
    if found[0].fits:
        return found[0]
    least = min(found, key=lambda one: one.needed)
    plan = replace(plan, layout=least.plan.layout)
    return replace(least, plan=plan, step=estimate(plan, work, node, stage=stage), remedy=None)


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    room = Cluster(GPUS["h100-80g"], GPUS_OF_NODE).room
    table = Table(title=f"8 GPUs of 80 GB, {SAMPLES} samples of {LENGTH}; a rank may use {room / GIB:.1f} GiB")
    rows = []
    for title, (stage, train, state) in CASES.items():
        found = best(stage, train, state)
        host = host_memory(found.plan)
        kinds = {kind: held / GIB for kind, held in found.step.memory.kinds.items()}
        row = {
            "case": title,
            "layout": layout_entry(found.plan.layout),
            "fits": found.fits,
            "gib": kinds,
            "peak_gib": found.step.memory.peak / GIB,
            "host_gib_of_node": found.step.memory.host * GPUS_OF_NODE / GIB,
            "host_gib_of_node_more_while_saving": host.save * GPUS_OF_NODE / GIB if host else 0.0,
            "seconds_of": dict(found.step.parts),
            "seconds": found.step.seconds,
            "mfu": found.step.mfu,
        }
        rows.append(row)
        if not table.columns:
            for column in ("trained", "layout", *kinds, "peak", "host, node", "s/step"):
                table.add_column(column, justify="left" if column in ("trained", "layout") else "right")
        entry = {key: value for key, value in layout_entry(found.plan.layout).items() if value != 1}
        shown = [f"{held:.1f}" for held in kinds.values()]
        fits = "" if found.fits else " (does not fit)"
        on_host = f"{row['host_gib_of_node']:.1f}"
        table.add_row(title, str(entry), *shown, f"{row['peak_gib']:.1f}{fits}", on_host, f"{found.step.seconds:.2f}")
    Console(width=180).print(table)
    if arguments.out:
        write_json(arguments.out, {"room_gib": room / GIB, "rows": rows})


if __name__ == "__main__":
    main()
