"""One safetensors file, of which nothing is touched but its header and the slices that are asked for.

safetensors' own ``safe_open`` maps the whole file as private memory, which a system refuses for a file larger than it
has memory: not even the names could be listed. Here the header is read, and a tensor's bytes are mapped, shared and
read-only, while a slice of them is copied out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultrafuser_mega.errors import InputError

#: Element types that weights may have -> torch's name. bf16 has no name in numpy, so bytes travel as whole numbers.
WEIGHT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CARRIER: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 2: np.dtype("<i2")}
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file.

    Attributes:
        code: the file's word for the element type, such as "BF16" or "F8_E4M3".
        shape: in elements.
        start: byte of the file.
        stop: byte of the file behind the last.
    """

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """Names, types and shapes of a file's tensors, and slices of them.

    Raises:
        InputError: it cannot be read, or its header and its length do not fit each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors = _read_header(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: truncated or damaged safetensors file ({error}); copy it again") from None

    def read(self, tensor: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """A copy of ``tensor[rows]`` or ``tensor[rows, columns]``, of one of ``WEIGHT_TYPES``."""
        stored = self.tensors[tensor]
        dtype = WEIGHT_TYPES[stored.code]
        try:
            whole: np.ndarray[Any, Any] = np.memmap(
                self.path, _CARRIER[dtype.itemsize], "r", stored.start, stored.shape
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read any more ({error}); copy it again") from None
        part = whole[rows] if columns is None else whole[rows, columns]
        return torch.from_numpy(np.array(part)).view(dtype)


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors: dict[str, Stored] = {}
    end = 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        stored = Stored(str(entry["dtype"]), tuple(map(int, entry["shape"])), start, stop)
        elements = math.prod(stored.shape)
        needed = elements * WEIGHT_TYPES[stored.code].itemsize if stored.code in WEIGHT_TYPES else stop - start
        if start != end or stop - start != needed or min(stored.shape, default=1) < 0:
            raise ValueError(f"tensor {name} of {stored.code} {stored.shape} in bytes {entry['data_offsets']}")
        tensors[name], end = stored, stop
    if end != size:
        raise ValueError(f"{size} bytes, its tensors end at {end}")
    return tensors
