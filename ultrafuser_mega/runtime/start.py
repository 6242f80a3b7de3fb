"""A name for each start of a job's ranks: they read nothing that an earlier one has left in the launcher's store.

torchrun's count of restarts is none: it is each node's own. A node that sees its rank fail counts, one that sees the
other leave does not, and then their ranks would look for each other under different names for ever.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_LOOK_EVERY_S = 0.02


def name_of_start(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A name that rank 0 gives, for all ``ranks`` that start together; returns when all have asked for it.

    Every rank asks under a name of its own, to which alone the answer is given: what an earlier start has asked or
    answered fits nobody.

    Raises:
        DistError: a rank does not come within ``timeout``.
    """
    own = uuid.uuid4().hex
    asks = [f"start/{other}" for other in range(ranks)]
    if rank:
        store.set(asks[rank], own)
        store.wait([f"{asks[rank]}/{own}"], timeout)
        name = store.get(f"{asks[rank]}/{own}").decode()
        store.set(f"{asks[rank]}/{name}/heard", "")
        return name
    missing, until = set(asks[1:]), time.monotonic() + timeout.total_seconds()
    while missing:
        for ask in sorted(missing):
            if store.check([ask]):
                store.set(f"{ask}/{store.get(ask).decode()}", own)
            if store.check([f"{ask}/{own}/heard"]):
                missing.remove(ask)
        if missing and time.monotonic() > until:
            raise dist.DistStoreError(f"{len(missing)} of {ranks} ranks did not start within {timeout}")
        time.sleep(_LOOK_EVERY_S)
    return own
