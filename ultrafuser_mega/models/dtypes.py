"""Element types of weights: their names in configurations and on the command line, and what a narrower one loses."""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_dtype(text: str | None) -> torch.dtype | None:
    """What ``--dtype`` means; None where it was not given."""
    if text is not None and text not in DTYPES:
        raise InputError(f"--dtype {text}: expected one of {', '.join(DTYPES)}")
    return DTYPES[text] if text else None


def narrowed(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """``tensor`` in ``dtype``: rounded where that is narrower (``sources.rounding`` says so), but never out of range.

    Args:
        tensor: of any floating type.
        dtype: to have it in.
        what: the folder and the name of the tensor, for the message.

    Raises:
        InputError: a number would become infinite; names the largest and the types that hold it.
    """
    result = tensor.to(dtype)
    end = torch.finfo(dtype).max
    if end >= torch.finfo(tensor.dtype).max:
        return result
    finite = tensor.isfinite()
    if bool((result.isinf() & finite).any()):
        largest = tensor[finite].abs().max().item()
        holding = " or ".join(name for name, wider in DTYPES.items() if largest <= torch.finfo(wider).max)
        word = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{what}: its largest value, {largest:g}, is beyond {word}, which ends at {end:g}; use {holding}"
        )
    return result
