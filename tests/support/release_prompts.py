"""Prompts of random ids for the released trios: three samples, no two specialists' lengths alike."""

from __future__ import annotations

from typing import Any

import torch
from support.release_folder import PIECES

STEPS = 12


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, PIECES, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# Lengths of three samples' prompts for each specialist; every specialist's longest is another sample.
PROMPTS = {
    name: [random_ids(length, seed=100 * place + row) for row, length in enumerate(lengths)]
    for place, (name, lengths) in enumerate({"text": (4, 9, 2), "code": (11, 3, 7), "math": (1, 6, 15)}.items())
}


def batch(rows: Any = (0, 1, 2)) -> dict[str, dict[str, torch.Tensor]]:
    ids, masks = {}, {}
    for name, prompts in PROMPTS.items():
        longest = max(len(prompts[row]) for row in rows)
        ids[name] = torch.tensor([[0] * (longest - len(prompts[row])) + prompts[row] for row in rows])
        masks[name] = torch.tensor([[0] * (longest - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
    return {"specialist_input_ids": ids, "specialist_attention_mask": masks}


def of_row(row: int) -> dict[str, list[int]]:
    return {name: prompts[row] for name, prompts in PROMPTS.items()}


def response(sequences: torch.Tensor, inputs: Any) -> list[list[int]]:
    return sequences[:, inputs["specialist_input_ids"]["text"].shape[1] :].tolist()
