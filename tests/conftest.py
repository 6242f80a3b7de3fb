"""Fixtures that several folders of tests share."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

# Small tensors: more threads only wait for each other, and the ranks of one test share the cores anyway.
torch.set_num_threads(1)
# Ranks of multi-process tests start with everything imported (see runtime/spawn.py).
multiprocessing.set_forkserver_preload(
    ["ultrafuser_mega.training.trainer", "ultrafuser_mega.toy", "ultrafuser_mega.convert.export"]
)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three tiny specialists and their data (see trio.py); read only."""
    from support.trio import write_trio  # imports Megatron, which tests of the loss alone do without

    return write_trio(tmp_path_factory.mktemp("trio"))
