"""Ranks of a fake job side by side: a process each, since a process can be one rank of one job."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.rehearsal import Rehearsal

_TIMEOUT_S = 3600


def rehearse_ranks(
    ranks: Sequence[int],
    world_size: int,
    device: str,
    config: Path | None,
    overrides: Sequence[str],
    done: Callable[[], None] = lambda: None,
) -> list[Rehearsal]:
    """What each of ``ranks`` would do in a job of ``world_size``.

    Args:
        device: "cpu" or "cuda"; both need no GPU.
        config, overrides: of the run, as on the command line.
        done: called when a rank is through.

    Raises:
        InputError: with what the first rank that failed said last.
    """

    def one(rank: int) -> Rehearsal:
        command = [sys.executable, "-m", "ultrafuser_mega.dry_run.processes"]
        command += [] if config is None else ["--config", str(config)]
        command += ["--ranks", str(world_size), "--rank", str(rank), "--device", device, "--", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_S)
        if ended.returncode:
            said = ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"]
            raise InputError(f"--dry-run: rank {rank}: {said[-1].removeprefix('error: ')}")
        done()
        return Rehearsal.from_json(json.loads(ended.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(one, ranks))


def main() -> int:
    """Be one rank; the last line on standard output is its rehearsal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    try:
        if asked.device == "cuda":
            from ultrafuser_mega.dry_run.fake_cuda import load_fake_cuda

            load_fake_cuda()
        import torch

        from ultrafuser_mega.config import load_config
        from ultrafuser_mega.data.store import MANIFEST, TokenStore
        from ultrafuser_mega.dry_run.rehearse import rehearse
        from ultrafuser_mega.planning.preflight import preflight

        config = load_config(asked.config, asked.overrides)
        plan = preflight(config, asked.ranks, resume=False)
        store = None
        if (config.store_dir / MANIFEST).is_file():
            store = TokenStore.open(config.store_dir, verify=False)
        device = torch.device("cuda", 0) if asked.device == "cuda" else torch.device("cpu")
        print(json.dumps(rehearse(plan, asked.rank, device, store).as_json()), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
