"""Every family of specialists computes, sharded, what transformers computes, and learns the same however sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILY_CASES, write_family
from support.trio import COLOCATED_TP2, CPU, ONE, config_tree, read_steps, train, write_trio
from torch import Tensor
from transformers import AutoModelForCausalLM

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.verify import sharded_logits, verification_batches, verify_specialist
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import check_positions, read_architecture
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import plan_colocated
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model

# Logits of up to 5 in float32, from two layers of four products of up to 96 terms: they round by some
# 5 * 2^-24 * sqrt(2 * 4 * 96) = 8e-6.
TOLERANCE = 1e-5


def batches(folder: Path) -> dict[str, Tensor]:
    return verification_batches(folder, "def add(a, b): return a + b", multiple=2)


@pytest.mark.parametrize(
    ("tp", "pp"),
    [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (1, 2), (2, 1), (4, 1), (4, 2)))],
)
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_sharded_specialist_equals_transformers(tmp_path: Path, case: str, tp: int, pp: int) -> None:
    """Other sizes are slow tests; the quick ones of all families at once, below, have them all."""
    folder = write_family(tmp_path / case, case)
    comparison = verify_specialist(folder, tp, pp, batches(folder))
    assert comparison.equal and comparison.tolerance <= 5 * TOLERANCE  # as measured; a verdict is only as good as it
    assert all(found.top1 == 1.0 and found.relative <= TOLERANCE for found in comparison.batches)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_colocated_specialists_of_all_families_equal_transformers(tmp_path: Path, tp: int, pp: int) -> None:
    """On the same ranks, so that between pipeline stages their hidden states travel in one tensor."""
    folders = {case: write_family(tmp_path / case, case) for case in FAMILY_CASES}
    tokens = list(batches(folders["llama"]).values())
    layout = plan_colocated(list(folders), tp, pp, dp=1)
    results = run_ranks(sharded_logits, tp * pp, folders, layout, tokens, False)
    (ours,) = (result for result in results if result is not None)
    for case, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for ids, mine in zip(tokens, ours[case], strict=True):
            with torch.no_grad():
                theirs = model(ids).logits[..., : mine.shape[-1]]
            assert (mine - theirs).abs().max() <= TOLERANCE, case


@pytest.mark.parametrize("case", ["qwen2_tied", "qwen3"])
def test_sequence_parallel_specialist_equals_transformers(tmp_path: Path, case: str) -> None:
    folder = write_family(tmp_path / case, case)
    assert verify_specialist(folder, 2, 2, batches(folder), sequence_parallel=True).equal


def test_sequences_beyond_a_sliding_window_are_refused_by_name(tmp_path: Path) -> None:
    arch = read_architecture(write_family(tmp_path, "mistral", sliding_window=128))
    check_positions("data.max_length", 128, "text", arch)
    with pytest.raises(InputError, match=r"data\.max_length: 129 tokens are more than the sliding_window = 128"):
        check_positions("data.max_length", 129, "text", arch)


def test_window_that_is_switched_off_limits_nothing(tmp_path: Path) -> None:
    """Qwen writes the window's length down even where it is not used."""
    assert read_architecture(write_family(tmp_path, "qwen3", sliding_window=64)).sliding_window is None


@pytest.mark.parametrize(
    ("cases", "sequence_parallel"),
    [
        pytest.param(("llama", "llama", "qwen3"), False, id="norms of queries and keys in the last only"),
        pytest.param(
            ("llama", "llama", "qwen3"), True, id="norms of queries and keys, sequence parallel", marks=pytest.mark.slow
        ),
        pytest.param(("qwen2", "qwen2_tied", "qwen2"), True, id="biases, sequence parallel"),
    ],
)
def test_families_learn_the_same_on_one_rank_and_on_two(
    tmp_path: Path, cases: tuple[str, str, str], sequence_parallel: bool
) -> None:
    """Biases are sharded with their heads, q and k norms shared by all heads: their gradients need their own sums."""
    trio = write_trio(tmp_path)
    for name, case in zip(("text", "code", "math"), cases, strict=True):
        write_family(trio / name, case, vocab_rows=416)
    runs = {}
    for name, layout, ranks in (("one", ONE, 1), ("two", COLOCATED_TP2, 2)):
        tree = config_tree(trio, tmp_path / name, layout) | {"microbatch_tokens": 320}
        tree["stage1"] |= {"steps": 1}
        tree["stage2"] |= {"steps": 2, "lr": 5e-3, "warmup_steps": 0}
        tree["evaluation"] = {"samples_per_class": 1, "token_views": 0}
        tree["parallel"] = {"sequence_parallel": sequence_parallel and ranks > 1}
        runs[name] = (train(tree, ranks), _final_weights(tree))
    (one, weights_one), (two, weights_two) = runs.values()
    for mine, theirs in zip(read_steps(two), read_steps(one), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    # Adam moves a weight by about lr = 5e-3 a step whatever its gradient's size: an unsummed gradient shows at that
    # scale, rounding (which Adam magnifies where gradients are near zero) does not in the mean.
    assert any("q_layernorm" in name or "qkv.bias" in name for name in weights_one)
    for name, weight in weights_one.items():
        if weight.dim() == 1 and ("layernorm" in name or "qkv.bias" in name):
            assert (weights_two[name] - weight).abs().mean() <= 2e-4, name


def _final_weights(tree: dict[str, Any]) -> dict[str, Tensor]:
    (weights,) = run_ranks(_load_on_one_rank, 1, tree)
    return weights


def _load_on_one_rank(rank: int, tree: dict[str, Any]) -> dict[str, Tensor]:
    plan = preflight(FuserConfig.model_validate({**tree, "layouts": [ONE]}), 1, resume=False)
    groups = make_groups(plan.layout)
    model = build_model(plan, groups, CPU)
    load_checkpoint(list_checkpoints(plan.config.run_dir / "checkpoints")[-1][1], model, groups, None, 0)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_every_family_has_a_case() -> None:
    from ultrafuser_mega.models.families import FAMILIES

    assert {case.split("_")[0] for case in FAMILY_CASES} - {"codellama"} == set(FAMILIES)
