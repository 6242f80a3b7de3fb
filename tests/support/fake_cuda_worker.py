"""Ranks of several plans on fake CUDA tensors, in a process of its own: the device must be there before torch.

A case is a configuration of a run, of whose first layout a rank of each kind is played; or ``{"layout": ..., "changes":
...}`` of the trio of tools/benchmarks/trio_13b.py, with two layers each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ultrafuser_mega.reporting.rehearsal import Rehearsal


def on_fake_cuda(cases: list[dict[str, Any]]) -> list[list[Rehearsal]]:
    """The rehearsals of each case."""
    benchmarks = Path(__file__).parents[2] / "tools" / "benchmarks"
    path = os.pathsep.join([str(benchmarks), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return [[Rehearsal.from_json(one) for one in case] for case in found]


def main() -> None:
    """The process."""
    from ultrafuser_mega.dry_run.fake_cuda import load_fake_cuda

    load_fake_cuda()
    import torch
    from trio_13b import two_layers

    from ultrafuser_mega.config import FuserConfig
    from ultrafuser_mega.dry_run.rehearse import rank_classes, rehearse
    from ultrafuser_mega.planning.preflight import plan_layouts, preflight

    found = []
    for case in json.loads(sys.argv[1]):
        if "layout" in case:
            plan = two_layers(case["layout"], **case["changes"])
        else:
            config = FuserConfig.model_validate(case)
            plan = preflight(config, plan_layouts(config)[0].world_size, resume=False)
        device = torch.device("cuda", 0)
        found.append([rehearse(plan, rank, device).as_json() for rank in rank_classes(plan)])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
