"""Runs that train parts of the model in their own ways, adapters among them, in any layout, against a float64 program.

Every step's loss and gradient norm; adapters, heads and gate at the end; and that what is frozen is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference_fuser import ReferenceLlama, fused_loss, sequences_of
from support.reference_run import GATE, ReferenceAdamW, rate
from support.trio import (
    COLOCATED_TP2_PP2,
    CPU,
    DISJOINT_3,
    DISJOINT_8,
    DISJOINT_CODE_TP4,
    ONE,
    config_tree,
    read_steps,
    train,
)
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, load_checkpoint
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.sampler import make_sampler
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.models.fused import load_hf_weights
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import build_model
from ultrafuser_mega.training.prepare import prepare

OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 1.0, "clip_grad": 0.1}
STAGE: dict[str, Any] = {"steps": 3, "samples_per_class": 2, "lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 2}
#: Stage -> what it trains: part -> mode and what the part has of its own. The reference knows no defaults.
CASES: dict[str, dict[int, dict[str, dict[str, Any]]]] = {
    "adapters": {
        1: {"gate": {"mode": "full", "lr": 1e-2, "min_lr": 1e-3}, "text": {"mode": "lora"}},
        2: {
            "gate": {"mode": "full", "lr": 4e-3, "min_lr": 4e-4},
            "heads": {"mode": "full", "lr": 5e-4, "min_lr": 5e-5, "weight_decay": 0.0},
            "text": {"mode": "lora", "lr": 3e-3, "min_lr": 0.0, "schedule": "constant", "warmup_steps": 1},
            "code": {"mode": "lora"},
            "math": {"mode": "frozen"},
        },
    },
    "a specialist in full": {
        1: {"gate": {"mode": "full"}, "heads": {"mode": "full", "lr": 1e-3, "min_lr": 1e-4}},
        2: {
            "gate": {"mode": "frozen"},
            "heads": {"mode": "frozen"},
            "text": {"mode": "full", "weight_decay": 0.5},
            "code": {"mode": "frozen"},
            "math": {"mode": "lora", "lr": 3e-3, "min_lr": 3e-4},
        },
    },
}
LORA: dict[str, Any] = {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
SP = {"sequence_parallel": True}
# As in test_runs_against_reference.py: float32 against float64.
LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-4, 5e-4

Reference = tuple[list[dict[str, float]], dict[str, Tensor]]


def tree_of(trio: Path, runs: Path, layout: dict[str, Any], parallel: dict[str, Any], case: str) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout)
    tree |= {f"stage{number}": STAGE | {"train": parts} for number, parts in CASES[case].items()}
    tree |= {"parallel": parallel, "microbatch_tokens": 320, "optimizer": OPTIMIZER, "lora": LORA}
    tree["evaluation"] = {"samples_per_class": 1, "token_views": 0, "every": 0}
    return tree


@pytest.fixture(scope="module")
def references(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    known: dict[str, Reference] = {}

    def of(case: str) -> Reference:
        if case not in known:
            known[case] = reference(trio, tmp_path_factory.mktemp("reference"), case)
        return known[case]

    return of


def reference(trio: Path, folder: Path, case: str) -> Reference:
    """Every step's loss and gradient norm; all weights at the end, by Hugging Face's names behind the specialist's."""
    plan = preflight(FuserConfig.model_validate(tree_of(trio, folder, ONE, {}, case)), 1, resume=False)
    prepare(plan.config, plan.vocab_size)
    store = TokenStore.open(plan.config.store_dir)
    specialists = {name: ReferenceLlama(path) for name, path in plan.config.folders.items()}
    begun = run_ranks(_weights, 1, plan.config.model_dump(mode="json"), None)[0]
    gate = {name: begun[f"gate.{name}"].double() for name in GATE}
    weights = {f"gate.{name}": weight for name, weight in gate.items()}
    for name, model in specialists.items():
        head = model.weights["lm_head.weight"].detach()[: plan.vocab_size].clone()
        model.weights["lm_head.weight"] = head.requires_grad_()
        model.scale = LORA["alpha"] / LORA["rank"]
        for key, a in list(begun.items()):
            if key.startswith(f"{name}.") and key.endswith(".lora_A"):
                adapted = key.removeprefix(f"{name}.").removesuffix(".lora_A")
                pair = a.double(), begun[key.removesuffix("A") + "B"].double()
                model.adapters[f"{adapted}.weight"] = pair
                weights |= {key: pair[0], key.removesuffix("A") + "B": pair[1]}
        weights |= {f"{name}.{key}": weight for key, weight in model.weights.items()}
    records = []
    for number, parts in CASES[case].items():
        trained = {key: weight for key, weight in weights.items() if _mode(key, parts) is not None}
        for key, weight in weights.items():
            weight.requires_grad_(key in trained)
        adam = ReferenceAdamW(trained, OPTIMIZER)
        counts = {name: len(store.split(name, "train")) for name in store.class_names}
        sampler = make_sampler("balanced", counts, {}, 2, plan.config.seed + number)
        for k in range(1, STAGE["steps"] + 1):
            sequences = sequences_of(store, sampler.batch(k - 1), list(specialists))
            loss = fused_loss(specialists, gate, sequences, plan.vocab_size)
            loss.backward()
            norm = adam.step(
                lambda key, k=k, parts=parts: _rate(key, k, parts),  # type: ignore[misc]
                lambda key, parts=parts: parts[_part(key)].get("weight_decay", OPTIMIZER["weight_decay"]),  # type: ignore[misc]
            )
            records.append({"loss": loss.item(), "grad_norm": norm})
    return records, {key: weight.detach() for key, weight in weights.items()}


def _part(key: str) -> str:
    return "heads" if key.endswith("lm_head.weight") else key.partition(".")[0]


def _mode(key: str, parts: dict[str, dict[str, Any]]) -> str | None:
    """How a weight is trained; None: not at all."""
    mode = parts.get(_part(key), {}).get("mode", "frozen")
    adapter = ".lora_" in key
    return mode if mode != "frozen" and adapter == (mode == "lora") else None


def _rate(key: str, k: int, parts: dict[str, dict[str, Any]]) -> float:
    stage = STAGE | parts[_part(key)]
    if stage.get("schedule") == "constant":
        return float(stage["lr"] * min(1.0, k / stage["warmup_steps"]))
    return rate(stage, k)


@pytest.mark.parametrize(
    ("layout", "ranks", "parallel", "case"),
    [
        pytest.param(ONE, 1, {"recompute_layers": "all"}, "adapters", id="one_rank_recomputed"),
        pytest.param(
            COLOCATED_TP2_PP2, 4, SP | {"recompute_layers": 1}, "adapters", id="colocated_tp2_pp2_sequence_parallel"
        ),
        pytest.param(DISJOINT_8, 8, {}, "adapters", id="disjoint_frozen_pipeline"),
        pytest.param(DISJOINT_CODE_TP4, 6, SP, "adapters", id="disjoint_shared_key_value_heads_sequence_parallel"),
        pytest.param(
            {**DISJOINT_3, "dp": 2}, 6, {"distributed_optimizer": True}, "adapters", id="dp2_distributed_optimizer"
        ),
        pytest.param(DISJOINT_8, 8, SP, "a specialist in full", id="disjoint_pipeline_of_adapters_sequence_parallel"),
        pytest.param(COLOCATED_TP2_PP2, 4, {}, "a specialist in full", id="colocated_tp2_pp2"),
    ],
)
def test_a_run_of_parts_is_that_of_an_independent_adamw(
    trio: Path,
    tmp_path: Path,
    references: Callable[[str], Reference],
    layout: dict[str, Any],
    ranks: int,
    parallel: dict[str, Any],
    case: str,
) -> None:
    expected, weights = references(case)
    tree = tree_of(trio, tmp_path, layout, parallel, case)
    run = train(tree, ranks)
    steps = read_steps(run)
    for kind, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        assert [step[kind] for step in steps] == pytest.approx([step[kind] for step in expected], rel=tolerance), kind
    checkpoint = list_checkpoints(run / "checkpoints")[-1][1]
    one = tree_of(trio, tmp_path, ONE, {}, case)
    trained = run_ranks(_weights, 1, one, checkpoint)[0]
    before = run_ranks(_weights, 1, one, None)[0]
    worst = {}
    for name, weight in trained.items():
        wanted = weights[name]
        if all(_mode(name, parts) is None for parts in CASES[case].values()):
            assert torch.equal(weight, before[name]), name
            continue
        worst[name] = (weight - wanted).abs().max().item() / (WEIGHT_TOLERANCE * wanted.abs().max().item() + 1e-6)
    assert worst
    assert {name: found for name, found in worst.items() if found > 1} == {}


def _weights(rank: int, tree: dict[str, Any], source: Path | None) -> dict[str, Tensor]:
    """All weights on one rank, as they come or of a checkpoint, by the names of the reference."""
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    groups = make_groups(plan.layout)
    model = build_model(plan, groups, CPU)
    if source is not None:
        load_checkpoint(source, model, groups, None, 0)
    else:
        load_hf_weights(model, plan.config.folders, groups)
    fusion = model.fusion
    assert fusion is not None
    found = {"gate.w1": fusion.gate.w1["shared"], "gate.b1": fusion.gate.b1, "gate.w2": fusion.gate.w2}
    for name, stage in model.stages.items():
        found[f"{name}.lm_head.weight"] = fusion.heads[name][: plan.vocab_size]
        for key, adapter in stage.adapters.layers.named_modules() if stage.adapters is not None else ():
            if not hasattr(adapter, "adapted"):
                continue
            layer, path = key.partition(".")[0], adapter.of.path
            module = "self_attn" if "attention" in path else "mlp"
            for part in adapter.adapted:
                where = f"{name}.model.layers.{layer}.{module}.{part.name}"
                found[f"{where}.lora_A"], found[f"{where}.lora_B"] = adapter.a[part.name], adapter.b[part.name]
    return {key: weight.detach().clone() for key, weight in found.items()}
