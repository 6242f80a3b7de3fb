"""The pickled index of a checkpoint: what every Python writes is read, anything else is refused before it acts."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.errors import InputError


class ByAttribute:
    """Pickled as ``getattr(owner, name)``, the form that Python 3.11.0 to 3.11.3 give the members of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def index_with(folder: Path, item: Any) -> Path:
    index = Metadata({}, planner_data=item)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_enum_members_pickled_by_attribute_are_read(tmp_path: Path) -> None:
    CheckpointTensors(index_with(tmp_path, ByAttribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")))


@pytest.mark.parametrize(("owner", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")])
def test_attributes_of_anything_else_are_refused(tmp_path: Path, owner: Any, name: Any) -> None:
    with pytest.raises(InputError, match=r"\.metadata: damaged checkpoint index"):
        CheckpointTensors(index_with(tmp_path, ByAttribute(owner, name)))


def test_functions_are_refused_before_they_are_called(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(InputError, match="mkdir has no place in an index"):
        CheckpointTensors(index_with(tmp_path, Payload()))
    assert not (tmp_path / "made").exists()
