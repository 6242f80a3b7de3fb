"""Fixtures that several folders of tests share, and how all tests run."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

# Small tensors: more threads only wait for each other, and the ranks of one test share the cores anyway.
torch.set_num_threads(1)
# Ranks of multi-process tests start with everything imported (see runtime/spawn.py).
PRELOADED = ["ultrafuser_mega.training.stage", "ultrafuser_mega.toy", "ultrafuser_mega.convert.export"]
multiprocessing.set_forkserver_preload(PRELOADED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed-offset", type=int, default=0, help="added to every seed that torch is given")


def pytest_configure(config: pytest.Config) -> None:
    if offset := config.getoption("--seed-offset"):
        os.environ["ULTRAFUSER_TEST_SEED_OFFSET"] = str(offset)
        import support.seeds  # noqa: F401  which applies it

        multiprocessing.set_forkserver_preload([*PRELOADED, "tests.support.seeds"])  # found from the project's folder


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three tiny specialists and their data (see trio.py); read only."""
    from support.trio import write_trio  # imports Megatron, which tests of the loss alone do without

    return write_trio(tmp_path_factory.mktemp("trio"))
