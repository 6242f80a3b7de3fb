"""The body of a training process: configuration, checks, toy specialists where asked for, the run.

``examples/pretrain_fuser.py`` and ``ultrafuser train`` both end here, on every rank.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.config import FuserConfig, load_config
from ultrafuser_mega.planning.preflight import plan_layouts, preflight
from ultrafuser_mega.runtime.device import choose_device, joined_job, launched_rank, launched_ranks, launcher_store
from ultrafuser_mega.runtime.failure import first_failure_ends_job
from ultrafuser_mega.runtime.layout import choose_plan
from ultrafuser_mega.toy import make_toy
from ultrafuser_mega.training.trainer import run

DESCRIPTION = """Fuse specialists into one model: stage 1 trains the gate, stage 2 everything.

    torchrun --nproc-per-node 8 examples/pretrain_fuser.py
    torchrun --nproc-per-node 8 examples/pretrain_fuser.py --config my.yaml stage2.steps=1000 dtype=bf16
    torchrun --nproc-per-node 8 examples/pretrain_fuser.py --config my.yaml --resume

Without --config it runs the embedded default: three toy specialists, made on first use, on generated
text / code / math data. Every key of the configuration can be overridden as key.sub=value.

Results go to runs/<name>: metrics.jsonl, TensorBoard events, checkpoints, plots, and at the end results.md and
summary.json. `ultrafuser plan` checks a configuration and shows what every rank would hold, without training.
"""


def train_main(config_path: Path | None, overrides: Sequence[str], resume: bool, requeue: bool = False) -> int:
    """Run one rank of a training job; returns 0, or ends the process (exit code 2: bad input, said in one line)."""
    store = launcher_store()
    with first_failure_ends_job(store):
        config = load_config(config_path, overrides)
        ensure_toy(config, launched_ranks())
        resume = resume or (requeue and bool(list_checkpoints(config.run_dir / "checkpoints")))
        plan = preflight(config, launched_ranks(), resume)
        device = choose_device(config.device)
        with joined_job(device, store):
            run(plan, device)
    return 0


def ensure_toy(config: FuserConfig, ranks: int) -> None:
    """Make the toy specialists when the configuration asks for them; one rank works, the others wait for it."""
    if config.toy is None:
        return
    choose_plan(plan_layouts(config), ranks)  # a wrong rank count should not cost minutes first
    make_toy(config.toy, progress=True)


def launch_local(ranks: int, config_path: Path | None, overrides: Sequence[str], resume: bool) -> NoReturn:
    """Become torchrun with ``ranks`` processes of :func:`train_main` on this machine: signals and exit code are its."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "ultrafuser_mega.launch.local", *overrides]
    if config_path is not None:
        command += ["--config", str(config_path)]
    if resume:
        command.append("--resume")
    sys.stdout.flush()
    os.execv(sys.executable, command)


def main() -> int:
    """Command line of one rank; ``examples/pretrain_fuser.py`` documents it."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file; default: the embedded one")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this run")
    parser.add_argument(
        "--requeue", action="store_true", help="--resume if the run has a checkpoint, else start afresh"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a configuration value")
    args = _parsed_once(parser)
    return train_main(args.config, args.overrides, args.resume, args.requeue)


def _parsed_once(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, which every rank reads; what there is to say about it, rank 0 says alone."""
    if launched_rank() == 0:
        return parser.parse_intermixed_args()
    with Path(os.devnull).open("w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        try:
            return parser.parse_intermixed_args()
        except SystemExit as end:
            if end.code:
                time.sleep(10)  # the launcher ends the job with the first rank that exits: let that be rank 0
            raise


if __name__ == "__main__":
    sys.exit(main())
