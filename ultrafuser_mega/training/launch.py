"""The body of a training process: configuration, checks, toy specialists where asked for, the run.

``examples/pretrain_fuser.py`` and ``ultrafuser train`` both end here, on every rank.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from ultrafuser_mega.config import FuserConfig, load_config
from ultrafuser_mega.errors import EXIT_BAD_INPUT, InputError
from ultrafuser_mega.runtime.device import choose_device, joined_job, launched_rank, launched_ranks
from ultrafuser_mega.runtime.failure import first_failure_ends_job
from ultrafuser_mega.toy import make_toy
from ultrafuser_mega.training.preflight import plan_layouts, preflight
from ultrafuser_mega.training.trainer import run


def train_main(config_path: Path | None, overrides: Sequence[str], resume: bool) -> int:
    """Run one rank of a training job; returns the exit code (2: bad input, said in one line by one rank)."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    try:
        config = load_config(config_path, overrides)
        ensure_toy(config)
        plan = preflight(config, launched_ranks(), resume)
        device = choose_device(config.device)
    except InputError as error:
        if launched_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    with joined_job(device), first_failure_ends_job():
        run(plan, device)
    return 0


def ensure_toy(config: FuserConfig) -> None:
    """Make the toy specialists when the configuration asks for them; one rank works, the others wait for it."""
    if config.toy is None:
        return
    from ultrafuser_mega.runtime.layout import choose_plan

    choose_plan(plan_layouts(config), launched_ranks())  # a wrong rank count should not cost minutes first
    done = config.toy / "recipe.json"
    if launched_rank() == 0:
        make_toy(config.toy, progress=True)
    while not done.is_file():
        time.sleep(1.0)
