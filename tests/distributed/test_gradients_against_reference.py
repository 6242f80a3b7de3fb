"""Every parameter's gradient, in every kind of layout, against the float64 reference of reference_fuser.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference_fuser import ReferenceLlama, fused_loss, sequences_of
from support.trio import (
    COLOCATED_TP2_PP2,
    COLOCATED_TP4,
    CPU,
    DISJOINT_3,
    DISJOINT_8,
    DISJOINT_CODE_TP4,
    DISJOINT_UNEVEN,
    ONE,
    config_tree,
    gradients_in_many_buckets,
    write_trio,
)

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.batches import TrainingBatches
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.models.fused import FusedStage, load_hf_weights
from ultrafuser_mega.planning.preflight import RunPlan, preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model, make_shard
from ultrafuser_mega.training.engine import Engine
from ultrafuser_mega.training.optimizer import make_trainable
from ultrafuser_mega.training.prepare import prepare

# float32 against float64: every gradient is a sum over tokens and layers of products of float32 numbers, whose relative
# rounding is 2^-24 each. Sums of some 10^3 to 10^4 terms that partly cancel lose two to three digits of 7.
TOLERANCE = 2e-4


EQUAL, DIFFERENT = (64, 64, 64), (64, 48, 96)
SP = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("layout", "ranks", "parallel", "hidden_sizes", "samples"),
    [
        pytest.param(ONE, 1, {}, EQUAL, 4, id="one_rank"),
        pytest.param(
            COLOCATED_TP2_PP2,
            4,
            SP | {"recompute_layers": 1},
            DIFFERENT,
            4,
            id="colocated_tp2_pp2_sequence_parallel_one_layer_recomputed",
        ),
        pytest.param(DISJOINT_8, 8, SP, DIFFERENT, 4, id="disjoint_8_ranks_sequence_parallel_different_widths"),
        pytest.param(
            {**DISJOINT_3, "dp": 2}, 6, {"recompute_layers": "all"}, EQUAL, 4, id="disjoint_dp2_all_layers_recomputed"
        ),
        pytest.param({**ONE, "dp": 5}, 5, {}, EQUAL, 1, id="more_replicas_than_samples"),
        pytest.param(DISJOINT_UNEVEN, 5, {}, EQUAL, 4, id="uneven_stages"),
        pytest.param(
            {**COLOCATED_TP4, "pp": 2},
            8,
            SP | {"recompute_layers": 1},
            DIFFERENT,
            4,
            id="colocated_shared_key_value_heads_pp2_sequence_parallel_one_layer_recomputed",
        ),
        pytest.param(DISJOINT_CODE_TP4, 6, SP, EQUAL, 4, id="disjoint_shared_key_value_heads_sequence_parallel"),
    ],
)
def test_gradient_of_every_parameter(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    layout: dict[str, Any],
    ranks: int,
    parallel: dict[str, Any],
    hidden_sizes: tuple[int, int, int],
    samples: int,
) -> None:
    trio = write_trio(tmp_path_factory.mktemp("trio"), hidden_sizes)
    tree = config_tree(trio, tmp_path / "runs", layout)
    tree["parallel"] = parallel
    tree["stage2"]["samples_per_class"] = samples
    plan = preflight(FuserConfig.model_validate(tree), ranks, resume=False)
    prepare(plan.config, plan.vocab_size)
    gate = run_ranks(_gate_weights, 1, {**tree, "layouts": [ONE]})[0]
    loss = _reference(plan, gate, tmp_path / "gradients")

    results = run_ranks(_compare, ranks, tree, tmp_path / "gradients")

    worst: dict[str, float] = {}
    for rank_result in results:
        for name, error in rank_result["errors"].items():
            worst[name] = max(error, worst.get(name, 0.0))
        if rank_result["loss"] is not None:
            assert rank_result["loss"] == pytest.approx(loss, rel=1e-5)
    assert {name: error for name, error in worst.items() if error > TOLERANCE} == {}
    kinds = ("word_embeddings", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "layernorm", "heads", "gate")
    assert [kind for kind in kinds if not any(kind in name for name in worst)] == []


def _global_batch(plan: RunPlan, groups: Any) -> tuple[TokenStore, TrainingBatches]:
    store = TokenStore.open(plan.config.store_dir)
    shard = make_shard(plan, groups)
    return store, TrainingBatches(store, plan.config.stage2.samples_per_class, plan.config.seed + 2, shard)


def _gate_weights(rank: int, tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    fusion = build_model(plan, make_groups(plan.layout), CPU).fusion
    assert fusion is not None
    return {name.replace("w1.shared", "w1"): p.detach().clone() for name, p in fusion.gate.named_parameters()}


def _reference(plan: RunPlan, gate: dict[str, torch.Tensor], folder: Path) -> float:
    """Writes the reference's gradients as folders of weights, and the gate's as gate.pt; returns its loss."""
    store = TokenStore.open(plan.config.store_dir)
    batches = TrainingBatches(
        store, plan.config.stage2.samples_per_class, plan.config.seed + 2, _FirstReplica.shard(plan)
    )
    sequences = sequences_of(store, batches.sampler.batch(0), list(plan.architectures))
    specialists = {name: ReferenceLlama(path) for name, path in plan.config.folders.items()}
    leaves = {name: tensor.double().requires_grad_() for name, tensor in gate.items()}
    loss = fused_loss(specialists, leaves, sequences, plan.vocab_size)
    loss.backward()
    for name, model in specialists.items():
        model.save_gradients(folder / name)
    gradients: dict[str, Any] = {name: leaf.grad for name, leaf in leaves.items()}
    torch.save({name: gradient.float() for name, gradient in gradients.items()}, folder / "gate.pt")
    return loss.item()


class _FirstReplica:
    """The whole global batch as one microbatch: what the reference looks at."""

    @staticmethod
    def shard(plan: RunPlan) -> Any:
        from ultrafuser_mega.data.batches import Shard

        return Shard(
            dp_rank=0,
            dp_size=1,
            microbatch_tokens=plan.config.microbatch_tokens,
            specialists=tuple(plan.architectures),
            multiples=dict.fromkeys(plan.architectures, 1),
            pad_id=2,
        )


def _compare(rank: int, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One step's gradients on this rank, against the reference's laid out like weights by the package's own reader."""
    plan = preflight(FuserConfig.model_validate(tree), torch.distributed.get_world_size(), resume=False)
    groups = make_groups(plan.layout)
    model, expected = build_model(plan, groups, CPU), build_model(plan, groups, CPU)
    load_hf_weights(model, plan.config.folders, groups)
    load_hf_weights(expected, {name: folder / name for name in plan.architectures}, groups)
    if expected.fusion is not None:
        _load_gate(expected, torch.load(folder / "gate.pt"))
    gradients_in_many_buckets()
    trainable = make_trainable(
        model,
        model.config,
        groups.megatron,
        plan.config.stage2,
        plan.config.optimizer,
        distributed_optimizer=False,
        overlap=True,
        device=CPU,
    )
    _, batches = _global_batch(plan, groups)
    batch = batches.step(0)
    total = 0.0

    def loss_of(hidden: dict[str, torch.Tensor], microbatch: Any) -> torch.Tensor:
        nonlocal total
        assert model.fusion is not None and model.exchange is not None
        loss, rows, _ = model.fusion.loss(model.exchange(hidden), microbatch.targets)
        total += rows.sum().item() / batch.response_tokens
        return loss / batch.response_tokens

    trainable.zero_grad()
    Engine(model, groups, CPU).train(trainable.wrapped, batch.microbatches, loss_of)
    errors = {}
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.main_grad - wanted[name]).abs().max()
        errors[name] = (difference / wanted[name].abs().max().clamp(min=1e-6)).item()
    sums = torch.tensor(total if groups.is_reporter else 0.0)
    torch.distributed.all_reduce(sums)
    return {"errors": errors, "loss": sums.item() if rank == 0 else None}


def _load_gate(model: FusedStage, whole: dict[str, torch.Tensor]) -> None:
    assert model.fusion is not None
    gate = model.fusion.gate
    start = gate.group.rank() * gate.local_units
    for name, parameter in gate.named_parameters():
        part = whole[name.replace("w1.shared", "w1")][start : start + gate.local_units]
        parameter.data.zero_()
        parameter.data[: part.shape[0]] = part
