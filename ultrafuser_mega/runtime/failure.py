"""When one rank fails: show its error once, first, and end the job.

The other ranks fail too, a moment later, because their peer is gone; what they would print is noise. All
ranks share the store that the job was joined through, and the first to fail claims the right to speak.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ultrafuser_mega.errors import EXIT_BAD_INPUT, InputError

_CLAIM = "ultrafuser/first_failure"


@contextmanager
def first_failure_ends_job() -> Iterator[None]:
    """Wrap what a rank does after joining the job; on an exception this does not return.

    The first failing rank prints its error, an InputError as one line and anything else with its
    traceback, and exits; the launcher then ends the others. Exit codes: 2 for bad input, 1 otherwise.
    """
    try:
        yield
    except BaseException as error:
        code = EXIT_BAD_INPUT if isinstance(error, InputError) else 1
        if _is_first():
            ranks = dist.get_world_size()
            where = f" (rank {dist.get_rank()} of {ranks})" if ranks > 1 else ""
            if isinstance(error, InputError):
                print(f"error: {error}", file=sys.stderr)
            elif isinstance(error, KeyboardInterrupt):
                print(f"interrupted{where}", file=sys.stderr)
            else:
                print(f"failed{where}:\n{traceback.format_exc()}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # No orderly shutdown: collectives that peers still wait in would never end.
        os._exit(code)


def _is_first() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add(_CLAIM, 1) == 1
    except Exception:  # the store's host is gone, so another rank failed before
        return False
