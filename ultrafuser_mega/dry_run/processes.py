"""Ranks of a fake job in processes of their own: CUDA's load a library before torch, and several run at once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.rehearsal import Rehearsal
from ultrafuser_mega.runtime.quiet import quiet_dependencies

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
        device: "cpu" or "cuda"; neither needs a GPU.
        config, overrides: of the run, as on the command line.
        done: called when a rank is through.

    Raises:
        InputError: with what the first rank that failed said last.
    """
    processes = min(len(ranks), os.cpu_count() or 1)
    shares = [ranks[first::processes] for first in range(processes)]

    def share(some: Sequence[int]) -> list[Rehearsal]:
        command = [sys.executable, "-m", "ultrafuser_mega.dry_run.processes"]
        command += [] if config is None else ["--config", str(config)]
        command += ["--ranks", str(world_size), "--device", device]
        command += [part for rank in some for part in ("--rank", str(rank))]
        found = []
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [*command, "--", *overrides],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    found.append(Rehearsal.from_json(json.loads(line)))
                    done()
            process.wait()
            errors.seek(0)
            said = errors.read().strip().splitlines()
        if process.returncode:
            last = said[-1] if said else f"ended with {process.returncode}"
            raise InputError(f"--dry-run: rank {some[len(found)]}: {last.removeprefix('error: ')}")
        return found

    with ThreadPoolExecutor(processes) as pool:
        found = [rehearsal for part in pool.map(share, shares) for rehearsal in part]
    return sorted(found, key=lambda rehearsal: ranks.index(rehearsal.rank))


def main() -> int:
    """Be some ranks, one after the other; each rehearsal is a line on standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rank", type=int, action="append", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    quiet_dependencies()
    try:
        if asked.device == "cuda":
            from ultrafuser_mega.dry_run.fake_cuda import load_fake_cuda

            load_fake_cuda()
        import torch

        from ultrafuser_mega.config import load_config
        from ultrafuser_mega.dry_run.rehearse import rehearse
        from ultrafuser_mega.planning.microbatch import prepared_store
        from ultrafuser_mega.planning.preflight import laid_out

        config = load_config(asked.config, asked.overrides)
        plan = laid_out(config, asked.ranks)
        store = prepared_store(config)
        device = torch.device("cuda", 0) if asked.device == "cuda" else torch.device("cpu")
        for rank in asked.rank:
            print(json.dumps(rehearse(plan, rank, device, store).as_json()), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
