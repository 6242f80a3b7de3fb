"""A trio of equal shapes branched from one base that is kept, and the trio's data: what merges and mixtures need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.trio import ONE, PIECES, config_tree

from ultrafuser_mega.toy import tiny_llama, tiny_tokenizer
from ultrafuser_mega.toy.corpus import generate

#: Rows of each specialist's vocabulary beyond the shared one.
EXTRA = {"text": 0, "code": 16, "math": 1}
CHANGE = 0.02  # of every weight, in its deviation: what training changed


def write_branched(root: Path, dtype: torch.dtype = torch.float32, tie: bool = False) -> Path:
    """``root``/{base,text,code,math} and ``root``/data, as ``support.trio.write_trio`` lays them out."""
    base = _tiny(root / "base", PIECES, 0, dtype, tie)
    weights = load_file(base / "model.safetensors")
    for number, (name, extra) in enumerate(EXTRA.items(), 1):
        folder = _tiny(root / name, PIECES + extra, number, dtype, tie)  # of which the rows beyond the base's stay
        own = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        for tensor, value in weights.items():
            change = CHANGE * torch.randn(value.shape, generator=generator)
            own[tensor][: len(value)] = (value.float() + change).to(dtype)
        save_file(own, folder / "model.safetensors", {"format": "pt"})
        data = generate(name, seed=7, train_rows=60, heldout_rows=12)
        (root / "data").mkdir(exist_ok=True)
        for split in ("train", "heldout"):
            lines = [json.dumps({"instruction": r.instruction, "output": r.output}) for r in getattr(data, split)]
            (root / "data" / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def branched_tree(root: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of a short run over it, on one rank."""
    return config_tree(root, runs, ONE) | changes


def _tiny(folder: Path, rows: int, seed: int, dtype: torch.dtype, tie: bool) -> Path:
    tiny_llama(
        folder,
        vocab_rows=rows,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2,
        rope_theta=1e4,
        seed=seed,
        dtype=dtype,
        tie=tie,
    )
    return tiny_tokenizer(folder, pieces=PIECES)
