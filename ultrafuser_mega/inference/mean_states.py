"""Texts as vectors: the mean of a model's last hidden states over the tokens that it reads (UltraFuser, figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ultrafuser_mega.inference.lanes import positions_of
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.requests import Prompt

LONGEST = 512  # tokens of a prompt that are read
_BATCH_TOKENS = 8192


@torch.inference_mode()
def mean_states(
    opened: OpenedModel, texts: Sequence[str], show: Callable[[int], None] = lambda count: None
) -> np.ndarray:  # (texts, d) float32
    """The vector of every text as a user's message in the model's own template.

    A fused model's is those of its specialists end to end, each as long as the others. A text that the template refuses
    has not-a-number in all places.

    Args:
        opened: the model.
        texts: any number.
        show: told after every batch how many texts are done.
    """
    model, names = opened.model, list(opened.model.names)
    longest = min(LONGEST, *positions_of(model).values())
    prompts = [_prompt(opened, text) for text in texts]
    vectors = {name: np.full((len(texts), _width(opened, name)), np.nan, np.float32) for name in names}
    done = prompts.count(None)
    for batch in _batches(prompts, longest):
        for name in names:
            rows = [prompts[place][name][:longest] for place in batch]  # type: ignore[index]
            ids, mask = _padded(rows, next(model.specialists[name].parameters()).device)
            hidden = model.last_hidden(name, ids, mask).float()
            # What stands at padding may be anything, even not a number, which no product with 0 gets rid of.
            summed = hidden.masked_fill(mask.unsqueeze(-1) == 0, 0).sum(dim=1)
            vectors[name][batch] = (summed / mask.sum(dim=1, keepdim=True)).cpu().numpy()
        done += len(batch)
        show(done)
    return _end_to_end([vectors[name] for name in names])


def _prompt(opened: OpenedModel, text: str) -> Prompt | None:
    try:
        prompt: Prompt = opened.model.chat_ids([[{"role": "user", "content": text}]], opened.tokenizer)[0]
    except ValueError:  # a template's own
        return None
    return prompt if all(len(ids) for ids in prompt.values()) else None


def _width(opened: OpenedModel, name: str) -> int:
    return int(opened.model.config.specialist_config(name).hidden_size)


def _batches(prompts: Sequence[Prompt | None], longest: int) -> Iterator[list[int]]:
    """Places of prompts of about one length, the longest first, so that a lack of memory shows at once."""
    length = {place: max(map(len, prompt.values())) for place, prompt in enumerate(prompts) if prompt is not None}
    places = sorted(length, key=lambda place: (-length[place], place))
    while places:
        count = max(1, _BATCH_TOKENS // min(longest, length[places[0]]))
        yield places[:count]
        del places[:count]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:  # (b, s), (b, s)
    """Ids and mask, padded behind the tokens: under a causal mask none of them sees padding."""
    width = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _end_to_end(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Specialists' vectors beside each other, scaled to one mean length where there are several."""
    if len(parts) == 1:
        return parts[0]
    lengths = [np.nanmean(np.linalg.norm(part, axis=1)) if np.isfinite(part).any() else 1.0 for part in parts]
    return np.concatenate([part / length for part, length in zip(parts, lengths, strict=True)], axis=1)
