"""Fixtures of the models' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.triton_workers import *  # noqa: F403  fixtures

from ultrafuser_mega.toy import tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 query heads in 4 groups; read only."""
    return tiny_llama(
        tmp_path_factory.mktemp("llama"),
        vocab_rows=72,
        hidden_size=96,
        layers=2,
        heads=8,
        kv_heads=4,
        rope_theta=1e6,
        seed=0,
        dtype=torch.float32,
    )
