"""Log-probabilities that a caller wants to see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultrafuser_mega.inference.requests import Likely


def likeliest(scores: Tensor, tokens: Tensor, wanted: Sequence[int | None]) -> list[Likely | None]:
    """Of R places.

    Args:
        scores: (R, V) float32, whose softmax is the distribution of a place.
        tokens: (R,) those that are there.
        wanted: how many of the likeliest tokens each place shows; None: it shows nothing.
    """
    found: list[Likely | None] = [None] * len(wanted)
    rows = [row for row, k in enumerate(wanted) if k is not None]
    if not rows:
        return found
    index = torch.tensor(rows, device=scores.device)
    likelihood = scores[index].log_softmax(-1)
    own = likelihood.gather(1, tokens[index][:, None])[:, 0].tolist()
    best = likelihood.topk(min(max(wanted[row] or 0 for row in rows), scores.shape[-1]), dim=-1)
    columns = zip(rows, own, best.indices.tolist(), best.values.tolist(), strict=True)
    for row, logprob, ids, values in columns:
        found[row] = Likely(logprob, list(zip(ids, values, strict=True))[: wanted[row]])
    return found
