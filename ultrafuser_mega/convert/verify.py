"""Does a sharded specialist compute what transformers computes? Full-sequence logits, float32 (``agreement``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ultrafuser_mega.convert.agreement import (
    Agreement,
    Comparison,
    check_memory,
    comparison_batches,
    limits,
    rounding_cost,
)
from ultrafuser_mega.data.packing import PackedTokens, positions_of, starts_of
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.models.fused import build_fused_stage, load_hf_weights
from ultrafuser_mega.models.fusion_head import LossOptions
from ultrafuser_mega.models.hf_folder import HFWeights, check_parallel_sizes, read_architecture
from ultrafuser_mega.release.check import loading
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import LayoutPlan, plan_disjoint
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.engine import Engine

_NAME = "specialist"


class Sequences:
    """A microbatch for the engine: b sequences of s tokens, the same for all specialists, every position a row."""

    def __init__(self, ids: Tensor, names: Iterable[str]) -> None:
        b, s = ids.shape
        lengths = (s,) * b
        packed = PackedTokens(
            ids.reshape(1, -1), torch.from_numpy(positions_of(lengths)), torch.from_numpy(starts_of(lengths)), lengths
        )
        self.shape = (b, s)
        self.tokens = dict.fromkeys(names, packed)
        self.rows = dict.fromkeys(names, torch.arange(b * s))

    def to(self, device: torch.device) -> Sequences:
        """Itself: what is compared is compared on CPUs."""
        return self


def verify_specialist(
    folder: Path,
    tp: int,
    pp: int,
    batches: dict[str, Tensor],
    *,
    sequence_parallel: bool = False,
    tolerance: float | None = None,
) -> Comparison:
    """Compare on ``tp * pp`` gloo ranks of this machine.

    Args:
        folder: Hugging Face folder of a specialist.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        batches: what to call it -> token ids (b, s).
        sequence_parallel: also shard the sequence; every s must then be a multiple of tp.
        tolerance: largest accepted difference of a float32 logit, in parts of the largest; None for what rounding
            explains (``rounding_cost``).

    Raises:
        InputError: the folder is unusable, tp or pp does not fit it, or the machine has too little memory.
    """
    arch = read_architecture(folder)
    HFWeights(folder, arch)
    check_parallel_sizes(folder.name, arch, tp, pp)
    check_memory(str(folder), [arch])
    names, tokens = list(batches), list(batches.values())
    layout = plan_disjoint({_NAME: (tp, pp, None)}, dp=1)
    results = run_ranks(sharded_logits, tp * pp, {_NAME: folder}, layout, tokens, sequence_parallel, timeout_s=600.0)
    (ours,) = (result[_NAME] for result in results if result is not None)
    model = load_folder(folder)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [model(ids, return_dict=True).logits for ids in tokens]

    theirs = run()
    found = [Agreement.of(name, *pair) for name, *pair in zip(names, ours, theirs, strict=True)]
    if tolerance is None:
        tolerance = rounding_cost(model, theirs, run)
    return Comparison.of(f"{folder} at tp={tp} pp={pp}", "transformers", tolerance, found)


def load_folder(folder: Path) -> Any:
    """transformers' own model of a Hugging Face folder, in float32; raises InputError where it cannot be loaded.

    The attention kernels that a config.json may ask for are no part of the model, and need not be installed here.
    """
    with loading(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config._attn_implementation = "sdpa"  # from_pretrained's own argument loses to some spellings in the file
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).eval()


def verification_batches(folder: Path, text: str, multiple: int) -> dict[str, Tensor]:
    """Random and real token ids (b, s) for a specialist; s is a multiple of ``multiple``.

    Raises:
        InputError: the folder is unusable, or has no token of ``text``.
    """
    rows, positions = limits([read_architecture(folder)])
    return comparison_batches(TextEncoder(folder).tokenizer(text)["input_ids"], rows, positions, multiple)


def sharded_logits(
    rank: int, folders: Mapping[str, Path], layout: LayoutPlan, batches: Sequence[Tensor], sequence_parallel: bool
) -> dict[str, list[Tensor]] | None:
    """Run by every rank of a job: what specialists compute that all of its ranks share.

    Args:
        rank: of this process.
        folders: name -> Hugging Face folder.
        layout: colocated, or of one specialist.
        batches: token ids (b, s), the same for all.
        sequence_parallel: also shard the sequence.

    Returns:
        On the reporting rank, name -> float32 logits (b, s, V) of every batch, V the vocabulary that all share.
    """
    device = torch.device("cpu")
    archs = {name: read_architecture(folder) for name, folder in folders.items()}
    vocab_size = min(arch.vocab_rows for arch in archs.values())
    groups = make_groups(layout)
    with megatron_scope(device):
        model = build_fused_stage(
            groups,
            archs,
            vocab_size=vocab_size,
            gate_units=1,
            dtype=torch.float32,
            device=device,
            sequence_parallel=sequence_parallel,
            loss=LossOptions(),
            seed=0,
        ).eval()
    load_hf_weights(model, folders, groups)
    collected: dict[str, list[Tensor]] = {name: [] for name in folders}

    def keep_logits(hidden: dict[str, Tensor], batch: Sequences) -> Tensor:
        fusion = model.fusion
        assert fusion is not None
        for name in folders:
            shard = hidden[name] @ fusion.heads[name].t()
            shards = [torch.empty_like(shard) for _ in range(fusion.group.size())]
            dist.all_gather(shards, shard, group=fusion.group)
            whole = torch.cat(shards, dim=1)[:, :vocab_size]
            collected[name].append(whole.view(*batch.shape, -1))
        return torch.zeros(())

    with torch.no_grad():
        Engine(model, groups, device).forward([Sequences(ids, folders) for ids in batches], keep_logits)
    return collected if groups.is_reporter else None
