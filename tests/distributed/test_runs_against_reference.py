"""Whole runs of both stages, in every kind of layout, against the float64 program of reference_run.py.

Every step's loss, rate and gradient norm, and all weights that the run ends with. Of options that change how a step is
computed each is on in some run and off in another: sequence parallelism, recomputation, the distributed optimizer, key
and value heads with copies, microbatches of many samples and of few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.reference_fuser import ReferenceLlama, fused_loss, sequences_of
from support.reference_run import reference_stage
from support.trio import (
    COLOCATED_TP2,
    COLOCATED_TP2_PP2,
    COLOCATED_TP4,
    CPU,
    DISJOINT_3,
    DISJOINT_6,
    DISJOINT_8,
    DISJOINT_CODE_TP4,
    DISJOINT_UNEVEN,
    ONE,
    config_tree,
    read_steps,
    train,
)
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.sampler import Sampler, make_sampler
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.models.fused import load_hf_weights
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model
from ultrafuser_mega.training.prepare import prepare

# eps keeps gradients that are nothing but rounding noise from becoming whole steps, which Adam makes of any gradient;
# the decay is strong enough that a parameter on the wrong side of it shows in every later loss.
OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 2.0, "clip_grad": 0.1}
STAGES = {
    "stage1": {"steps": 5, "samples_per_class": 2, "lr": 2e-2, "min_lr": 2e-3, "warmup_steps": 2},
    "stage2": {"steps": 6, "samples_per_class": 2, "lr": 1e-3, "gate_lr": 4e-3, "min_lr": 1e-4, "warmup_steps": 3},
}
# float32 against float64. Losses are means of rows of order one whose logits are sums of float32 products: 2^-24 each,
# some tens of layers deep, so 1e-6; gradients lose two to three digits more by cancellation (see
# test_gradients_against_reference.py). Adam divides by the gradient's own size, so a weight that moved by a whole step
# (sum of rates / largest weight, about half of the gate's) carries the gradient's relative error.
TOLERANCE = {"loss": 1e-6, "lr": 1e-12, "gate_lr": 1e-12, "grad_norm": 1e-4}
GATE_TOLERANCE = 5e-4  # in parts of the largest number of a parameter
WEIGHT_TOLERANCE = 1e-4

PP4 = {"kind": "disjoint", "specialists": {"text": {}, "code": {}, "math": {"pp": 4}}}
SP, DISTRIBUTED = {"sequence_parallel": True}, {"distributed_optimizer": True}

Reference = tuple[list[dict[str, float]], dict[str, Tensor]]


def tree_of(trio: Path, runs: Path, layout: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout) | STAGES | {"optimizer": OPTIMIZER}
    tree |= {"parallel": parallel, "microbatch_tokens": 320}
    tree["evaluation"] = {"samples_per_class": 1, "token_views": 0, "every": 0}
    return tree


@pytest.fixture(scope="module")
def reference(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Every step's loss, rate and gradient norm, and the weights at the end by the names of the package's model."""
    folder = tmp_path_factory.mktemp("reference")
    tree = tree_of(trio, folder, ONE, {})
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    prepare(plan.config, plan.vocab_size)
    store = TokenStore.open(plan.config.store_dir)
    specialists = {name: ReferenceLlama(path) for name, path in plan.config.folders.items()}
    for model in specialists.values():  # rows beyond the shared vocabulary are no part of what is trained
        head = model.weights["lm_head.weight"].detach()[: plan.vocab_size].clone()
        model.weights["lm_head.weight"] = head.requires_grad_()
    begun = run_ranks(_weights, 1, tree, None)[0]
    gate = {name: begun[_name_of(name)].double().requires_grad_() for name in ("w1", "b1", "w2")}
    everything = {f"{name}.{key}": w for name, model in specialists.items() for key, w in model.weights.items()}
    records = []
    for number, weights in ((1, gate), (2, gate | everything)):
        stage = tree[f"stage{number}"]
        counts = {name: len(store.split(name, "train")) for name in store.class_names}
        sampler = make_sampler("balanced", counts, {}, stage["samples_per_class"], plan.config.seed + number)

        def loss_of_step(step: int, sampler: Sampler = sampler) -> Tensor:
            sequences = sequences_of(store, sampler.batch(step), list(specialists))
            return fused_loss(specialists, gate, sequences, plan.vocab_size)

        for weight in everything.values():
            weight.requires_grad_(number == 2)
        records += reference_stage(weights, stage, OPTIMIZER, loss_of_step)
    for name, model in specialists.items():
        model.save_weights(folder / name)
    weights = run_ranks(_weights, 1, tree, {name: folder / name for name in specialists})[0]
    return records, weights | {_name_of(name): weight.detach() for name, weight in gate.items()}


@pytest.mark.parametrize(
    ("layout", "ranks", "parallel"),
    [
        pytest.param(ONE, 1, {}, id="one_rank"),
        pytest.param(
            ONE,
            1,
            {"recompute_layers": "all"},
            id="one_rank_all_layers_recomputed_few_samples_together",
            marks=pytest.mark.slow,
        ),
        pytest.param(COLOCATED_TP2, 2, {"recompute_layers": 1}, id="colocated_tp2", marks=pytest.mark.slow),
        pytest.param(COLOCATED_TP2_PP2, 4, SP, id="colocated_tp2_pp2_sequence_parallel"),
        pytest.param(PP4, 6, {"recompute_layers": 1}, id="disjoint_pp4_one_layer_recomputed"),
        pytest.param({**ONE, "dp": 5}, 5, {}, id="replicas_that_do_not_divide_the_batch"),
        pytest.param(DISJOINT_UNEVEN, 5, {}, id="disjoint_uneven_stages"),
        pytest.param(DISJOINT_6, 6, SP, id="disjoint_2_2_2_sequence_parallel", marks=pytest.mark.slow),
        pytest.param(DISJOINT_8, 8, {}, id="the_default_8_ranks", marks=pytest.mark.slow),
        pytest.param(
            DISJOINT_8,
            8,
            SP | {"recompute_layers": "all"},
            id="the_default_8_ranks_sequence_parallel_all_layers_recomputed",
            marks=pytest.mark.slow,
        ),
        pytest.param({**DISJOINT_3, "dp": 2}, 6, DISTRIBUTED, id="disjoint_dp2_distributed_optimizer"),
        pytest.param({**DISJOINT_3, "dp": 2}, 6, {}, id="disjoint_dp2", marks=pytest.mark.slow),
        pytest.param(DISJOINT_CODE_TP4, 6, SP, id="disjoint_shared_key_value_heads_sequence_parallel"),
        pytest.param(
            {**COLOCATED_TP4, "dp": 2},
            8,
            SP | DISTRIBUTED,
            id="colocated_shared_key_value_heads_dp2_sequence_parallel_distributed_optimizer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_whole_run_is_that_of_an_independent_adamw(
    trio: Path,
    tmp_path: Path,
    reference: Reference,
    request: pytest.FixtureRequest,
    layout: dict[str, Any],
    ranks: int,
    parallel: dict[str, Any],
) -> None:
    expected, weights = reference
    tree = tree_of(trio, tmp_path, layout, parallel)
    if "few_samples_together" in request.node.callspec.id:
        tree["microbatch_tokens"] = tree["data"]["max_length"]
    run = train(tree, ranks)
    steps = read_steps(run)
    assert [step["step"] for step in steps] == list(range(1, len(expected) + 1))
    for kind, tolerance in TOLERANCE.items():
        assert [step[kind] for step in steps] == pytest.approx([step[kind] for step in expected], rel=tolerance), kind
    checkpoint = list_checkpoints(run / "checkpoints")[-1][1]
    trained = run_ranks(_weights, 1, tree_of(trio, tmp_path, ONE, {}), checkpoint)[0]
    assert trained.keys() == weights.keys()
    worst = {}
    for name, weight in trained.items():
        allowed = GATE_TOLERANCE * weights[name].abs().max().item() if ".gate." in name else WEIGHT_TOLERANCE
        worst[name] = (weight - weights[name]).abs().max().item() / allowed
    assert {name: found for name, found in worst.items() if found > 1} == {}


def _name_of(gates: str) -> str:
    """In the package's model, of the reference's w1, b1 and w2."""
    return f"fusion.gate.{gates}" + (".shared" if gates == "w1" else "")


def _weights(rank: int, tree: dict[str, Any], source: Path | dict[str, Path] | None) -> dict[str, Tensor]:
    """All weights on one rank: those of a checkpoint, of Hugging Face folders, or those that a run begins with."""
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    groups = make_groups(plan.layout)
    model = build_model(plan, groups, CPU)
    if isinstance(source, Path):
        load_checkpoint(source, model, groups, None, 0)
    else:
        load_hf_weights(model, source or plan.config.folders, groups)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
