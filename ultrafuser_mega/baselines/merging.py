"""Weights of equal shapes put together without training: averages and task arithmetic.

Both are a sum of models, each times a number. It is taken in float64, a thousand rows at a time, and rounded once, to
the widest of the models' element types; written tensor by tensor in shards, so that one tensor is in memory at a time.

    average           sum_i w_i t_i, sum_i w_i = 1                       Wortsman et al. 2022
    task arithmetic   b + s sum_i (t_i - b), b the base, s the scale     Ilharco et al. 2023
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ultrafuser_mega.baselines.ingredients import Ingredients
from ultrafuser_mega.convert.shards import SHARD_BYTES, Planned, write_shards
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.dtypes import narrowed

BASE = "base"


def average_coefficients(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of specialists, divided by their sum.

    Raises:
        InputError: they cannot be weights of an average.
    """
    total = math.fsum(weights.values())
    if not math.isfinite(total) or total <= 0 or min(weights.values()) < 0:
        shown = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        raise InputError(f"--of {shown}: weights of an average must be 0 or more, and one more than 0")
    return {name: weight / total for name, weight in weights.items()}


def task_coefficients(specialists: Mapping[str, float], scale: float) -> dict[str, float]:
    """What task arithmetic multiplies each specialist and the base with; a specialist's own weight is mostly 1."""
    parts = {name: scale * weight for name, weight in specialists.items()}
    return {**parts, BASE: 1.0 - math.fsum(parts.values())}


def combined(ingredients: Ingredients, coefficients: Mapping[str, float], tensor: str) -> Tensor:
    """The sum of the models' ``tensor``, each times its coefficient, in the ingredients' element type for it."""
    dtype = ingredients.dtype(tensor)
    result = torch.empty(ingredients.shapes[tensor], dtype=dtype)
    for rows in ingredients.row_blocks(tensor):
        total = torch.zeros(result[rows].shape, dtype=torch.float64)
        for name, coefficient in coefficients.items():
            total.add_(ingredients.read(name, tensor, rows).double(), alpha=coefficient)
        result[rows] = narrowed(total, dtype, f"the merged model: tensor {tensor}")
    return result


def write_combination(
    folder: Path,
    ingredients: Ingredients,
    coefficients: Callable[[str], Mapping[str, float]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the sum's safetensors into ``folder``, which exists and holds none; ``coefficients`` are each tensor's."""
    planned = {name: Planned(shape, ingredients.dtype(name)) for name, shape in ingredients.shapes.items()}
    write_shards(folder, planned, lambda name: combined(ingredients, coefficients(name), name), "merge", shard_bytes)
