"""Distillation on the trainer, in every kind of layout, against a float64 program of its own.

The teacher is a trio fused by a gate as it was drawn; the student is one more model, asked in its own form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference_fuser import ReferenceLlama, sequences_of
from support.reference_run import reference_stage
from support.trio import COLOCATED_TP2_PP2, ONE, config_tree, read_steps, train
from torch import Tensor

from ultrafuser_mega.baselines.distilled import STUDENT, distilled
from ultrafuser_mega.checkpoint.tensors import CheckpointTensors
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.importer import import_specialists, plan_config
from ultrafuser_mega.data.sampler import make_sampler
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.training.prepare import prepare

OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.5, "clip_grad": 0.1}
STAGE: dict[str, Any] = {"steps": 4, "samples_per_class": 2, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2}
LESSON = {"temperature": 2.0, "reverse": 0.3, "labels": 0.2}
# As in test_runs_against_reference.py; losses here are divergences times T^2 = 4 of distributions that are alike, so
# they lose a digit more than cross-entropies of order one do.
TOLERANCE = {"loss": 1e-5, "lr": 1e-12, "grad_norm": 2e-4}
DISJOINT: dict[str, Any] = {"kind": "disjoint", "specialists": {"text": {}, "code": {"tp": 2}, "math": {}}}


@pytest.fixture(scope="module")
def teacher(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the trio with the gate that a run begins with."""
    folder = tmp_path_factory.mktemp("teacher")
    tree = config_tree(trio, folder / "runs", ONE) | {"optimizer": OPTIMIZER, "microbatch_tokens": 320}
    tree["stage2"] = STAGE
    tree["evaluation"] = {"samples_per_class": 1, "token_views": 0, "every": 0}
    import_specialists(plan_config(FuserConfig.model_validate(tree), None), folder / "checkpoint")
    return folder / "checkpoint"


def tree_of(teacher: Path, runs: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """The run that distils into math, which reads math's folder in text's form."""
    overrides = [f"runs={runs}", "stage2.steps=4", *(f"distil.{key}={value}" for key, value in LESSON.items())]
    tree = distilled(teacher, "math", "ultralm", overrides=overrides).config.model_dump(mode="json")
    places = {"specialists": layout["specialists"] | {STUDENT: {"pp": 1}}} if "specialists" in layout else {}
    return tree | {"layouts": [layout | places]}


def reference(teacher: Path, tree: dict[str, Any]) -> list[dict[str, float]]:
    """Every step's loss, rate and gradient norm in float64."""
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    prepare(plan.config, plan.vocab_size)
    store = TokenStore.open(plan.config.store_dir)
    models = {name: ReferenceLlama(folder) for name, folder in plan.config.folders.items()}
    student = models.pop(STUDENT)
    head = student.weights["lm_head.weight"].detach()[: plan.vocab_size].clone()
    student.weights["lm_head.weight"] = head.requires_grad_()
    tensors = CheckpointTensors(teacher)
    w1, b1, w2 = (tensors.read(f"gate.{name}").double() for name in ("w1.shared", "b1", "w2"))
    counts = {name: len(store.split(name, "train")) for name in store.class_names}
    sampler = make_sampler("balanced", counts, {}, STAGE["samples_per_class"], plan.config.seed + 2)

    def at(model: ReferenceLlama, sequence: tuple[list[int], list[int]]) -> Tensor:
        ids, positions = sequence
        return model(torch.tensor(ids))[torch.tensor(positions) - 1]

    def loss_of_step(step: int) -> Tensor:
        terms = []
        for sample in sequences_of(store, sampler.batch(step), [*models, STUDENT]):
            with torch.no_grad():
                hidden = {name: at(model, sample[name]) for name, model in models.items()}
                weights = torch.stack([torch.relu(h @ w1.T + b1) @ w2 for h in hidden.values()], 1).softmax(1)
                logits = [h @ models[name].weights["lm_head.weight"][: plan.vocab_size].T for name, h in hidden.items()]
                z = torch.stack([weights[:, j, None] * o for j, o in enumerate(logits)]).sum(0)
            s = at(student, sample[STUDENT]) @ student.weights["lm_head.weight"].T
            ids, positions = sample[STUDENT]
            log_p, log_q = (z / 2.0).log_softmax(1), (s / 2.0).log_softmax(1)
            forward, backward = (log_p.exp() * (log_p - log_q)).sum(1), (log_q.exp() * (log_q - log_p)).sum(1)
            labels = -s.log_softmax(1).gather(1, torch.tensor(ids)[torch.tensor(positions)][:, None])[:, 0]
            terms.append(0.8 * 4.0 * (0.7 * forward + 0.3 * backward) + 0.2 * labels)
        return torch.cat(terms).mean()

    for model in models.values():
        for weight in model.weights.values():
            weight.requires_grad_(False)
    return reference_stage(student.weights, STAGE, OPTIMIZER, loss_of_step)


def test_a_student_learns_in_every_layout_what_the_float64_program_says(teacher: Path, tmp_path: Path) -> None:
    expected = reference(teacher, tree_of(teacher, tmp_path / "reference", ONE))
    before = CheckpointTensors(teacher)
    layouts: list[tuple[str, dict[str, Any], int]] = [
        ("one", ONE, 1),
        ("tp2_pp2", COLOCATED_TP2_PP2, 4),
        ("disjoint", DISJOINT, 5),
    ]
    for name, layout, ranks in layouts:
        run = train(tree_of(teacher, tmp_path / name, layout), ranks)
        steps = read_steps(run)
        for kind, tolerance in TOLERANCE.items():
            found = [step[kind] for step in steps]
            assert found == pytest.approx([step[kind] for step in expected], rel=tolerance), (name, kind)
        after = CheckpointTensors(run / "checkpoints" / "stage2-step0000004")
        rows = before.shape("heads.text")[0]
        for frozen in ("gate.w1.shared", "heads.text"):
            first = before.read(frozen)
            assert after.read(frozen)[: len(first)][:rows].equal(first[: after.shape(frozen)[0]]), frozen
        assert f"specialists.{STUDENT}.decoder.final_layernorm.weight" in after
        assert "specialists.text.decoder.final_layernorm.weight" not in after  # is the teacher's, which has it
