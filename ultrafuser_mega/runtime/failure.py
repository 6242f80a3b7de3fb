"""When one rank fails: show its error once, first, and end the job.

The other ranks fail too, either by the same cause or, a moment later, because their peer is gone; what they would
print is noise. All ranks share the launcher's store, and the first to fail claims the right to speak.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ultrafuser_mega.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, DivergedError, InputError
from ultrafuser_mega.runtime.device import launched_rank, launched_ranks

_FAILED, _SPOKEN, _LEAVING = "failure/ranks", "failure/spoken", "failure/leaving"
_PATIENCE = timedelta(seconds=10)


@contextmanager
def first_failure_ends_job(store: dist.Store) -> Iterator[None]:
    """Wrap everything a rank does; on an exception this does not return.

    The first failing rank prints its error, an InputError or DivergedError as one line and anything else with its
    traceback, and exits; the launcher then ends the others. Exit codes: 2 for bad input, 3 for divergence, 1 otherwise.

    Args:
        store: what the ranks of the job share, from :func:`ultrafuser_mega.runtime.device.launcher_store`.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(dist.DistError):  # the store's host is gone: it has failed, and spoken, before
            if store.add(_FAILED, 1) == 1:
                _speak(error)
                store.set(_SPOKEN, "")
            else:
                store.wait([_SPOKEN], _PATIENCE)  # once one rank has exited, the launcher ends the others
            store.add(_LEAVING, 1)
            if launched_rank() == 0:
                _stay_for_the_others(store)
        sys.stdout.flush()
        # No orderly shutdown: collectives that peers still wait in would never end.
        codes = {InputError: EXIT_BAD_INPUT, DivergedError: EXIT_DIVERGED}
        os._exit(next((code for kind, code in codes.items() if isinstance(error, kind)), 1))


def _speak(error: BaseException) -> None:
    ranks = launched_ranks()
    where = f" (rank {launched_rank()} of {ranks})" if ranks > 1 else ""
    if isinstance(error, InputError | DivergedError):
        message = f"error: {error}"
    elif isinstance(error, KeyboardInterrupt):
        message = f"interrupted{where}; --resume goes on from the newest checkpoint, if there is one"
    else:
        message = f"failed{where}:\n{''.join(traceback.format_exception(error))}"
    print(message, file=sys.stderr, flush=True)


def _stay_for_the_others(store: dist.Store) -> None:
    """Without torchrun, rank 0 hosts the store: give the ranks that fail by the same cause time to ask it."""
    until = time.monotonic() + 2.0
    while store.add(_LEAVING, 0) < launched_ranks() and time.monotonic() < until:
        time.sleep(0.02)
