"""A sharded specialist computes what transformers computes, and the check that says so can fail."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ultrafuser_mega.cli import main
from ultrafuser_mega.convert.verify import verification_batches, verify_specialist
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import tiny_llama, tiny_tokenizer

PIECES = 400


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight query heads in four groups, rows that tp = 4 does not divide."""
    return make_specialist(tmp_path_factory.mktemp("grouped"), kv_heads=4, vocab_rows=PIECES + 1, tie=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedding serves as output head; one head per group."""
    return make_specialist(tmp_path_factory.mktemp("tied"), kv_heads=8, vocab_rows=PIECES, tie=True)


def make_specialist(folder: Path, *, kv_heads: int, vocab_rows: int, tie: bool) -> Path:
    tiny_llama(
        folder,
        vocab_rows=vocab_rows,
        hidden_size=64,
        layers=2,
        heads=8,
        kv_heads=kv_heads,
        rope_theta=1e6,
        seed=5,
        dtype=torch.float32,
        tie=tie,
    )
    return tiny_tokenizer(folder, pieces=PIECES)


def batches(folder: Path) -> dict[str, Tensor]:
    return verification_batches(folder, "def add(a, b): return a + b", multiple=4)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sharded_specialist_equals_transformers(grouped: Path, tp: int, pp: int) -> None:
    comparison = verify_specialist(grouped, tp, pp, batches(grouped))
    assert {found.what for found in comparison.batches} == {"random", "real"}
    assert comparison.equal
    assert all(found.top1 == 1.0 for found in comparison.batches)


def test_sequence_parallel_specialist_equals_transformers(grouped: Path) -> None:
    assert verify_specialist(grouped, 4, 2, batches(grouped), sequence_parallel=True).equal


def test_specialist_with_tied_embeddings_equals_transformers(tied: Path) -> None:
    assert verify_specialist(tied, 2, 2, batches(tied), sequence_parallel=True).equal


def test_wrong_rope_theta_shows(grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads theta 1e6 from the intact folder, the sharded model 1e4 from one that was tampered with."""
    spoilt = Path(shutil.copytree(grouped, tmp_path / "spoilt"))
    config = json.loads((spoilt / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e4
    (spoilt / "config.json").write_text(json.dumps(config))
    intact = AutoModelForCausalLM.from_pretrained(grouped, dtype=torch.float32, local_files_only=True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: intact)
    comparison = verify_specialist(spoilt, 2, 1, batches(spoilt))
    assert all(found.relative > 1000 * comparison.tolerance for found in comparison.batches)


def test_sizes_that_do_not_fit_are_refused_before_any_rank_starts(grouped: Path) -> None:
    with pytest.raises(InputError, match="tp = 3 does not divide the 8 attention heads"):
        verify_specialist(grouped, 3, 1, {})


@pytest.mark.parametrize(("tolerance", "verdict", "code"), [("1e-4", "equal", 0), ("1e-12", "DIFFERENT", 1)])
def test_verify_command_prints_the_difference_and_says_the_verdict(
    grouped: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tolerance: str,
    verdict: str,
    code: int,
) -> None:
    monkeypatch.setattr(sys, "argv", ["ultrafuser", "verify", str(grouped), "--tp", "2", "--tolerance", tolerance])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    random, real, conclusion = capsys.readouterr().out.splitlines()
    assert random.startswith("random tokens (4, 96): max abs logit difference ")
    assert real.startswith("real tokens (1, ")
    assert conclusion.startswith(f"{verdict} within ")
