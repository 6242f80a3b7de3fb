"""Compile the loss's Triton kernels side by side into Triton's cache on disk, where later processes find them.

    TRITON_CACHE_DIR=... python tools/benchmarks/warm_kernels.py [--capability 90] [--processes 14] [--out FILE.json]

Needs no GPU and touches none: kernels go through Triton's own launch path up to the driver (absent_gpu.py), so that
the cache's keys are those of a launch on the real one. First what the goal's shapes take in every type, then the shapes
of tests/gpu, then the tuner's candidates. Rows and the size of a vocabulary decide no key (whether 16 divides it does),
so that small tensors stand for large ones.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch
import tune_kernels
from benchmark import Shape
from scripting import Parser, positive, result_file, write_json

TOKENS = 128
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GOAL = ((64, 64, 64), 4096)  # three specialists, all that 16 divides
OF_TESTS = (
    ((64, 128, 96), 333),
    ((256, 256, 256), 32016),
    ((64, 80), 4096),
    ((32,), 7),
    ((48,) * 5, 1000),
    ((33, 50), 333),
)
KERNELS = tuple(name for name in tune_kernels.CANDIDATES if name != tune_kernels.GATE_BLOCKS)
WRITE_EVERY_S = 5.0


class Job(NamedTuple):
    kernel: str  # of tune_kernels.CANDIDATES
    dtype: str
    widths: tuple[int, ...]
    vocab: int
    config: Any = None  # the tuner's candidate; None: what the tables say


def jobs(parts: list[str]) -> Iterator[Job]:
    """What to compile, the first needed first."""
    shapes = [shape for part, found in (("goal", (GOAL,)), ("tests", OF_TESTS)) if part in parts for shape in found]
    for widths, vocab in shapes:
        for dtype in DTYPES:
            yield from (Job(kernel, dtype, widths, vocab) for kernel in KERNELS)
    if "candidates" in parts:
        for kernel in KERNELS:
            yield from (Job(kernel, "bf16", *GOAL, config) for config in tune_kernels.CANDIDATES[kernel])


def stand_in(capability: int) -> None:
    """Makes a worker's Triton compile for a GPU that it does not touch."""
    from absent_gpu import AbsentGpu

    torch.set_num_threads(1)
    os.nice(10)  # the benchmarks that run meanwhile come first
    AbsentGpu(capability).stand_in()


def compile_one(job: Job, capability: int) -> float:
    """Seconds that it took."""
    begun = time.perf_counter()
    device = torch.device("cpu")
    call = tune_kernels.kernel_calls(Shape(TOKENS, job.vocab, job.widths, DTYPES[job.dtype]), device)[job.kernel]
    if job.config is None:
        call()
    else:
        table, key = tune_kernels.table_of(job.kernel, capability)
        before, table[key] = table[key], job.config
        try:
            call()
        finally:
            table[key] = before
    return time.perf_counter() - begun


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--capability", type=positive, default=90, help="of the GPU to compile for; default %(default)s"
    )
    parser.add_argument("--processes", type=positive, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--part", choices=("goal", "tests", "candidates"), action="append", help="default: all")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: all; may be repeated")
    parser.add_argument("--out", type=result_file, help="JSON file, written anew every few seconds")
    arguments = parser.parse_args()
    wanted = [job for job in jobs(arguments.part or ["goal", "tests", "candidates"])
              if job.kernel in (arguments.kernel or KERNELS)]  # fmt: skip
    records: list[dict[str, Any]] = []
    report = {"capability": arguments.capability, "jobs": len(wanted), "seconds": 0.0, "kernels": records}
    begun = written = time.perf_counter()
    pool = ProcessPoolExecutor(
        min(arguments.processes, len(wanted)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=stand_in,
        initargs=(arguments.capability,),
    )
    with pool:
        running = {pool.submit(compile_one, job, arguments.capability): job for job in wanted}
        for done in as_completed(running):
            record = {name: value for name, value in running[done]._asdict().items() if value is not None}
            if error := done.exception():  # a candidate that does not fit: the tuner lists it
                record["failed"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            else:
                record["seconds"] = done.result()
            records.append(record)
            now = time.perf_counter()
            report["seconds"] = now - begun
            if arguments.out and (now - written > WRITE_EVERY_S or len(records) == len(wanted)):
                write_json(arguments.out, report)
                written = now
    failed = [record for record in records if "failed" in record]
    print(f"warmed {len(records) - len(failed)} of {len(wanted)} kernels in {time.perf_counter() - begun:.0f} s")
    for record in failed:
        print(f"  {record['kernel']} {record['dtype']} {record.get('config', '')}: {record['failed']}")


if __name__ == "__main__":
    main()
