"""The plan of three Llama-2-13B models, from numbers alone: no folder is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.models.hf_folder import Architecture
from ultrafuser_mega.planning.preflight import RunPlan, plan_layouts

ROWS = {"text": 32000, "code": 32016, "math": 32001}


def llama_13b(vocab_rows: int) -> Architecture:
    """Llama-2-13B with that many vocabulary rows."""
    return Architecture(
        hidden_size=5120,
        ffn_size=13824,
        heads=40,
        kv_heads=40,
        head_dim=128,
        layers=40,
        vocab_rows=vocab_rows,
        max_positions=4096,
        norm_eps=1e-5,
        rope_theta=1e4,
        tied=False,
    )


def plan_13b(layout: dict[str, Any], **changes: Any) -> RunPlan:
    """The trio in bf16 with sequence parallelism and the distributed optimizer, unless ``changes`` say otherwise."""
    stage = {"steps": 100, "samples_per_class": 32, "lr": 2e-5}
    tree = {
        "dtype": "bf16",
        "specialists": {name: {"path": name} for name in ROWS},
        "layouts": [layout],
        "parallel": {"sequence_parallel": True, "distributed_optimizer": True},
        "data": {"classes": {name: {"train": ["rows.jsonl"]} for name in ROWS}},
        "microbatch_tokens": 8192,
        "stage1": stage,
        "stage2": stage,
    }
    config = FuserConfig.model_validate(tree | changes)
    return RunPlan(
        config=config,
        architectures={name: llama_13b(rows) for name, rows in ROWS.items()},
        layout=plan_layouts(config)[0],
        vocab_size=32000,
        gate_units=5120,
        resume=None,
    )


def two_layers(layout: dict[str, Any], **changes: Any) -> RunPlan:
    """The same with two layers each, for what is too slow with forty."""
    plan = plan_13b(layout, **changes)
    archs = {name: replace(arch, layers=2) for name, arch in plan.architectures.items()}
    return replace(plan, architectures=archs)
