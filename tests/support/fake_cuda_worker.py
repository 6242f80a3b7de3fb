"""Runs ranks of several layouts on fake CUDA tensors, in a process of its own: the device must be there before torch.

    python fake_cuda_worker.py TREES      a JSON list of configurations, the first layout of each
Prints one JSON object: index of the configuration -> the rehearsals of one rank of each kind.
"""

from __future__ import annotations

import json
import sys

from ultrafuser_mega.dry_run.fake_cuda import load_fake_cuda


def main() -> None:
    load_fake_cuda()
    import torch

    from ultrafuser_mega.config import FuserConfig
    from ultrafuser_mega.dry_run.rehearse import rank_classes, rehearse
    from ultrafuser_mega.planning.preflight import plan_layouts, preflight

    found = {}
    for index, tree in enumerate(json.loads(sys.argv[1])):
        config = FuserConfig.model_validate(tree)
        plan = preflight(config, plan_layouts(config)[0].world_size, resume=False)
        ranks = rank_classes(plan.layout)
        found[index] = [rehearse(plan, rank, torch.device("cuda", 0)).as_json() for rank in ranks]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
