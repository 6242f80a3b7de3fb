"""Three tiny random specialists with data, and a configuration of a run over them: shared by the slower tests.

They differ as a real trio does: vocabulary rows V, V + 16 and V + 1, rope theta 1e4, 1e6 and 1e4, grouped queries in
one of them. Their names are not in alphabetical order, so that anything that sorts them shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.toy import tiny_llama, tiny_tokenizer
from ultrafuser_mega.toy.corpus import generate
from ultrafuser_mega.training import optimizer
from ultrafuser_mega.training.run import run

PIECES = 400
CPU = torch.device("cpu")

ONE = {"kind": "colocated"}
COLOCATED_TP2 = {"kind": "colocated", "tp": 2}
COLOCATED_TP4 = {"kind": "colocated", "tp": 4}  # two ranks to each of code's key/value heads
COLOCATED_TP2_PP2 = {"kind": "colocated", "tp": 2, "pp": 2}
DISJOINT_3 = {"kind": "disjoint", "specialists": {"text": {}, "code": {}, "math": {}}}
DISJOINT_6 = {"kind": "disjoint", "specialists": {"text": {"tp": 2}, "code": {"tp": 2}, "math": {"tp": 2}}}
DISJOINT_8 = {"kind": "disjoint", "specialists": {"text": {"tp": 2}, "code": {"tp": 2}, "math": {"tp": 2, "pp": 2}}}
DISJOINT_CODE_TP4 = {"kind": "disjoint", "specialists": {"text": {}, "code": {"tp": 4}, "math": {}}}
DISJOINT_UNEVEN = {"kind": "disjoint", "specialists": {"text": {}, "code": {}, "math": {"pp": 3}}}  # 4 layers in 3


def write_trio(root: Path, hidden_sizes: tuple[int, int, int] = (64, 64, 64)) -> Path:
    """``root``/{text,code,math} as Hugging Face folders and ``root``/data/<class>.{train,heldout}.jsonl."""
    rows = {"text": PIECES, "code": PIECES + 16, "math": PIECES + 1}
    for seed, (name, hidden) in enumerate(zip(rows, hidden_sizes, strict=True)):
        tiny_llama(
            root / name,
            vocab_rows=rows[name],
            hidden_size=hidden,
            layers=4 if name == "math" else 2,
            heads=4,
            kv_heads=2 if name == "code" else 4,
            rope_theta=1e6 if name == "code" else 1e4,
            seed=seed,
            dtype=torch.float32,
        )
        tiny_tokenizer(root / name, pieces=PIECES)
        data = generate(name, seed=7, train_rows=60, heldout_rows=12)
        (root / "data").mkdir(exist_ok=True)
        for split in ("train", "heldout"):
            lines = [json.dumps({"instruction": r.instruction, "output": r.output}) for r in getattr(data, split)]
            (root / "data" / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def config_tree(trio: Path, runs: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a short run, as YAML would give it; tests change what they are about."""
    classes = {n: {"train": [f"{n}.train.jsonl"], "heldout": [f"{n}.heldout.jsonl"]} for n in ("text", "code", "math")}
    return {
        "name": "run",
        "runs": str(runs),
        "models": str(trio),
        "specialists": {
            "text": {"path": "text", "template": "ultralm"},
            "code": {"path": "code", "template": "codellama"},
            "math": {"path": "math", "template": "wizardmath"},
        },
        "layouts": [layout],
        "data": {"root": str(trio / "data"), "max_length": 160, "classes": classes},
        "microbatch_tokens": 480,
        "stage1": {"steps": 2, "samples_per_class": 2, "lr": 5e-3, "warmup_steps": 1},
        "stage2": {"steps": 3, "samples_per_class": 2, "lr": 5e-4, "warmup_steps": 1},
        "evaluation": {"samples_per_class": 2, "token_views": 0},
    }


def train(tree: dict[str, Any], ranks: int, resume: bool = False, timeout_s: float = 240.0) -> Path:
    """Run a whole training job on ``ranks`` gloo ranks, without plots; returns its run folder."""
    run_ranks(_train_rank, ranks, tree, resume, timeout_s=timeout_s)
    return FuserConfig.model_validate(tree).run_dir


def draw_nothing() -> None:
    """For this process: a run draws no plots, which take longer than training it did."""
    RunReport._draw = lambda *of: None  # type: ignore[method-assign]


def gradients_in_many_buckets() -> None:
    """For this process: replicas sum the gradients of these small models in several parts, as they do large ones'."""
    optimizer.BUCKET_PARAMETERS = 10_000


def _train_rank(rank: int, tree: dict[str, Any], resume: bool) -> None:
    draw_nothing()
    gradients_in_many_buckets()
    config = FuserConfig.model_validate(tree)
    run(preflight(config, torch.distributed.get_world_size(), resume), CPU)


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The step records of a run."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]
