"""When one rank fails: show its error once, first, and end the job.

The other ranks fail too, either by the same cause or, a moment later, because their peer is gone; what they would
print is noise. All ranks share the launcher's store, and the first to fail claims the right to speak. A rank that has
lost its peer is never that first one: it lets the peer, or the launcher that ends it, go before. What was said is also
left where torchrun looks for it (``TORCHELASTIC_ERROR_FILE``), so that its report names the cause too.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from ultrafuser_mega.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, DivergedError, InputError, system_refusal
from ultrafuser_mega.runtime.device import launched_rank, launched_ranks

_FAILED, _SPOKEN, _LEAVING = "failure/ranks", "failure/spoken", "failure/leaving"
_PATIENCE_S = 10.0
# Launchers look after their ranks several times a second and end the job with the first that is gone: nobody else
# should exit before they have seen that one.
_LAUNCHER_S = 1.0
# Of gloo and of the store's sockets. NCCL's have a type of their own.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")


@contextmanager
def first_failure_ends_job(store: dist.Store) -> Iterator[None]:
    """Wrap everything a rank does; on an exception this does not return.

    The first failing rank prints its error and exits; the launcher then ends the others. An InputError, a DivergedError
    and what the system has against a place are one line, anything else comes with its traceback. Exit codes: 2 for bad
    input and such a place, 3 for divergence, 1 otherwise.

    Args:
        store: what the ranks of the job share, from :func:`ultrafuser_mega.runtime.device.launcher_store`.
    """
    try:
        yield
    except BaseException as error:
        lost = lost_peer(error)
        end_job(store, functools.partial(_message, error), _exit_code(error), lost=lost)


def end_job(store: dist.Store, message: Callable[[], str], code: int, *, lost: bool = False) -> NoReturn:
    """End this rank with exit code ``code``, and with it the job.

    Args:
        store: as for :func:`first_failure_ends_job`.
        message: what to say, if no other rank has failed before.
        code: of this rank.
        lost: a peer's end is the reason: it speaks first.
    """
    with contextlib.suppress(dist.DistError):  # the store's host is gone: it has failed, and spoken, before
        first = not (lost and _spoken(store)) and store.add(_FAILED, 1) == 1
        if first:
            said = message()
            leave_for_torchrun(said)
            print(said, file=sys.stderr, flush=True)
            store.set(_SPOKEN, said)
        elif _spoken(store):  # should torchrun's report be about this rank nevertheless
            leave_for_torchrun(store.get(_SPOKEN).decode())
        store.add(_LEAVING, 1)
        if launched_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _stay_for_the_others(store)
        if not first:
            time.sleep(_LAUNCHER_S)
    sys.stdout.flush()
    # No orderly shutdown: collectives that peers still wait in would never end.
    os._exit(code)


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says that another rank is gone, rather than why."""
    if isinstance(error, BrokenPipeError):  # its own: nobody reads what it prints
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST_PEER)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, OSError):
        return EXIT_BAD_INPUT if system_refusal(error) else 1
    codes = {InputError: EXIT_BAD_INPUT, DivergedError: EXIT_DIVERGED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def _spoken(store: dist.Store) -> bool:
    """Wait for the rank that failed first to say why; False if none does."""
    until = time.monotonic() + _PATIENCE_S
    while not store.check([_SPOKEN]):  # store.wait would print warnings of its own
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _message(error: BaseException) -> str:
    ranks = launched_ranks()
    where = f" (rank {launched_rank()} of {ranks})" if ranks > 1 else ""
    if isinstance(error, InputError | DivergedError):
        return f"error: {error}"
    if isinstance(error, OSError) and (refusal := system_refusal(error)):
        return f"error: {refusal}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; --resume goes on from the newest checkpoint, if there is one"
    message = f"failed{where}:\n{''.join(traceback.format_exception(error)).rstrip()}"
    if lost_peer(error):
        message += "\nno other rank said why: one may have been killed, be out of memory or cut off from the network"
    return message


def leave_for_torchrun(message: str) -> None:
    """Write the file that torchrun's report quotes, in its form; it gives every rank a name for it.

    The report has a part for every rank, so this is one line: of a traceback, which has been printed, the error's own.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        first, *rest = message.splitlines()
        message = " ".join([first, *rest[-1:]])
        told = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}))


def _stay_for_the_others(store: dist.Store) -> None:
    """Where rank 0 hosts the store: give the ranks that fail by the same cause time to ask it."""
    until = time.monotonic() + 2.0
    while store.add(_LEAVING, 0) < launched_ranks() and time.monotonic() < until:
        time.sleep(0.02)
