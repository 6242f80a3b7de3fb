"""Whole runs of both stages against the float64 program of reference_run.py: every step, and the gate they end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.reference_fuser import ReferenceLlama, fused_loss, sequences_of
from support.reference_run import reference_stage
from support.trio import CPU, DISJOINT_3, ONE, config_tree, read_steps, train
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.sampler import ClassBalanceSampler
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.prepare import prepare
from ultrafuser_mega.training.trainer import build_model

# eps keeps gradients that are nothing but rounding noise from becoming whole steps, which Adam makes of any gradient;
# the decay is strong enough that a parameter on the wrong side of it shows in every later loss.
OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 2.0, "clip_grad": 0.1}
STAGES = {
    "stage1": {"steps": 5, "samples_per_class": 2, "lr": 2e-2, "min_lr": 2e-3, "warmup_steps": 2},
    "stage2": {"steps": 6, "samples_per_class": 2, "lr": 1e-3, "min_lr": 0.0, "warmup_steps": 3},
}
# float32 against float64. Losses are means of rows of order one whose logits are sums of float32 products: 2^-24 each,
# some tens of layers deep, so 1e-6; gradients lose two to three digits more by cancellation (see
# test_gradients_against_reference.py). Adam divides by the gradient's own size, so a weight that moved by a whole step
# (sum of rates / largest weight, about half of the gate's) carries the gradient's relative error.
TOLERANCE = {"loss": 1e-6, "lr": 1e-12, "grad_norm": 1e-4}
GATE_TOLERANCE = 5e-4

Reference = tuple[list[dict[str, float]], dict[str, Tensor]]


def tree_of(trio: Path, runs: Path, layout: dict[str, Any], distributed: bool = False) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout) | STAGES | {"optimizer": OPTIMIZER}
    tree["parallel"] = {"distributed_optimizer": distributed}
    tree["evaluation"] = {"samples_per_class": 1, "token_views": 0, "every": 0}
    return tree


@pytest.fixture(scope="module")
def reference(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Every step's loss, rate and gradient norm, and the gate at the end."""
    tree = tree_of(trio, tmp_path_factory.mktemp("reference"), ONE)
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    prepare(plan.config, plan.vocab_size)
    store = TokenStore.open(plan.config.store_dir)
    specialists = {name: ReferenceLlama(path) for name, path in plan.config.folders.items()}
    for model in specialists.values():  # rows beyond the shared vocabulary are no part of what is trained
        head = model.weights["lm_head.weight"].detach()[: plan.vocab_size].clone()
        model.weights["lm_head.weight"] = head.requires_grad_()
    gate = {name: w.double().requires_grad_() for name, w in run_ranks(_gate, 1, tree, None)[0].items()}
    everything = {f"{name}.{key}": w for name, model in specialists.items() for key, w in model.weights.items()}
    records = []
    for number, weights in ((1, gate), (2, gate | everything)):
        stage = tree[f"stage{number}"]
        counts = {name: len(store.split(name, "train")) for name in store.class_names}
        sampler = ClassBalanceSampler(counts, stage["samples_per_class"], plan.config.seed + number)

        def loss_of_step(step: int, sampler: ClassBalanceSampler = sampler) -> Tensor:
            sequences = sequences_of(store, sampler.batch(step), list(specialists))
            return fused_loss(specialists, gate, sequences, plan.vocab_size)

        for weight in everything.values():
            weight.requires_grad_(number == 2)
        records += reference_stage(weights, stage, OPTIMIZER, loss_of_step)
    return records, {name: weight.detach() for name, weight in gate.items()}


@pytest.mark.parametrize(
    ("layout", "ranks", "distributed"),
    [
        pytest.param(ONE, 1, False, id="one_rank"),
        pytest.param({**DISJOINT_3, "dp": 2}, 6, True, id="disjoint_dp2_distributed_optimizer"),
    ],
)
def test_a_whole_run_is_that_of_an_independent_adamw(
    trio: Path, tmp_path: Path, reference: Reference, layout: dict[str, Any], ranks: int, distributed: bool
) -> None:
    expected, gate = reference
    run = train(tree_of(trio, tmp_path, layout, distributed), ranks)
    steps = read_steps(run)
    for kind, tolerance in TOLERANCE.items():
        assert [step[kind] for step in steps] == pytest.approx([step[kind] for step in expected], rel=tolerance), kind
    checkpoint = list_checkpoints(run / "checkpoints")[-1][1]
    trained = run_ranks(_gate, 1, tree_of(trio, tmp_path, ONE), checkpoint)[0]
    for name, weight in gate.items():
        difference = (trained[name] - weight).abs().max() / weight.abs().max()
        assert difference < GATE_TOLERANCE, name


def _gate(rank: int, tree: dict[str, Any], checkpoint: Path | None) -> dict[str, Tensor]:
    """The gate as a run begins with it, or as ``checkpoint`` has it."""
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    groups = make_groups(plan.layout)
    model = build_model(plan, groups, CPU)
    if checkpoint is not None:
        load_checkpoint(checkpoint, model, groups, None, 0)
    assert model.fusion is not None
    named = model.fusion.gate.named_parameters()
    return {name.replace("w1.shared", "w1"): p.detach().clone() for name, p in named}
