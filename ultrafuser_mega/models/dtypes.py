"""Element types of weights, as configurations and the command line name them."""

from __future__ import annotations

import torch

from ultrafuser_mega.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_dtype(text: str | None) -> torch.dtype | None:
    """What ``--dtype`` means; None where it was not given."""
    if text is not None and text not in DTYPES:
        raise InputError(f"--dtype {text}: expected one of {', '.join(DTYPES)}")
    return DTYPES[text] if text else None
