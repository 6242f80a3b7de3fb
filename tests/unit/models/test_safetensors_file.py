"""A safetensors file is read by header and slice: equal to safetensors' own reading, however large the file is."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.safetensors_file import SafetensorsFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_equal_those_of_the_tensors_that_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(7, generator=generator), "b": torch.randn(6, 10, generator=generator)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "file")
    assert {name: stored.shape for name, stored in file.tensors.items()} == {"a": (7,), "b": (6, 10)}
    assert torch.equal(file.read("a"), tensors["a"])
    assert torch.equal(file.read("b", slice(2, 5)), tensors["b"][2:5])
    part = file.read("b", columns=slice(3, 9))
    assert torch.equal(part, tensors["b"][:, 3:9]) and part.is_contiguous()


def test_a_file_larger_than_the_memory_is_read_by_slice(tmp_path: Path) -> None:
    """A sparse file of more than the address space that this process may take."""
    rows, columns = 1 << 22, 1 << 18
    entries = {
        "large": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [2 * rows * columns, 2 * rows * columns + 8]},
    }
    header = json.dumps(entries).encode()
    with (tmp_path / "file").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * rows * columns)
        file.seek(0, 2)
        file.write(torch.tensor([1.0, 2.0]).numpy().tobytes())
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, limits[1]))
    try:
        opened = SafetensorsFile(tmp_path / "file")
        assert opened.tensors["large"].shape == (rows, columns)
        assert opened.read("small").tolist() == [1.0, 2.0]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def with_header(text: str) -> Callable[[bytes], bytes]:
    return lambda content: len(text).to_bytes(8, "little") + text.encode() + bytes(16)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: content[:4], id="no header"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
        pytest.param(lambda content: content + b"0", id="a byte long"),
        pytest.param(lambda content: (1 << 60).to_bytes(8, "little") + content[8:], id="length beyond the file"),
        pytest.param(with_header("{"), id="no JSON"),
        pytest.param(with_header("[]"), id="no object"),
        pytest.param(with_header('{"a": {"dtype": "F32", "shape": [4]}}'), id="no offsets"),
        pytest.param(with_header('{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}'), id="other size"),
        pytest.param(with_header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}'), id="a hole"),
        pytest.param(with_header('{"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}'), id="negative"),
        pytest.param(with_header('{"a": 3}'), id="an entry that is none"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.ones(4)}, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"file: truncated or damaged safetensors file \(.*\); copy it again"):
        SafetensorsFile(path)
