"""The same fused model trained by a plain PyTorch script, written the ordinary way, to be timed beside the trainer.

transformers' models, a two-layer gate, the mixed logits of peers.py, F.cross_entropy, autocast and AdamW on fp32
weights. Nothing of the trainer is in here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ultrafuser_mega.toy.training import Sample

IGNORE = -100
CLIP = 1.0


class PlainFuser(nn.Module):
    """n causal language models and the gate that weighs their logits."""

    def __init__(self, folders: dict[str, Path], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.members: list[Any] = [
            LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)  # type: ignore[arg-type]
            for folder in folders.values()
        ]
        self.specialists = nn.ModuleList(self.members)
        width = int(self.members[0].config.hidden_size)
        self.device = device
        self.gate = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1, bias=False)).to(device)

    def inputs(self, ids: Sequence[Tensor], predicts: Sequence[Tensor], frozen: bool) -> tuple[list[Tensor], Tensor]:
        """ids, predicts: per specialist (B, T). n x (N, d) hidden states before response tokens; (N, n) gate logits."""
        with torch.no_grad() if frozen else contextlib.nullcontext():
            hidden = [
                member.model(input_ids=tokens, use_cache=False).last_hidden_state[mask]
                for member, tokens, mask in zip(self.members, ids, predicts, strict=True)
            ]
        return hidden, torch.cat([self.gate(states.float()) for states in hidden], 1).float()

    @property
    def heads(self) -> list[Tensor]:
        return [member.lm_head.weight for member in self.members]


class PlainTrainer:
    """Steps of one stage; ``loss``: of peers.py."""

    def __init__(self, model: PlainFuser, stage: int, loss: Callable[..., Tensor], compute: torch.dtype) -> None:
        self.model, self.frozen, self.loss, self.compute = model, stage == 1, loss, compute
        self.device = model.device
        if not self.frozen:
            model.specialists.float()  # what AdamW moves; autocast makes 16 bits of it
        model.specialists.requires_grad_(not self.frozen)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-5, betas=(0.9, 0.95), fused=True, weight_decay=0.0)

    def step(self, microbatches: Sequence[Sequence[Sequence[Sample]]]) -> int:
        """One optimizer step over (microbatch, specialist, sample); returns the number of response tokens."""
        total = sum(len(sample.response) for microbatch in microbatches for sample in microbatch[0])
        for microbatch in microbatches:
            ids, predicts, target = collated(microbatch, self.device)
            with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
                hidden, gate_logits = self.model.inputs(ids, predicts, self.frozen)
                hidden = [states.to(self.compute) for states in hidden]
                heads = [head.to(self.compute) for head in self.model.heads]
                vocab = min(head.shape[0] for head in heads)
                loss = self.loss(hidden, heads, gate_logits, target, vocab_size=vocab, reduction="sum") / total
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def collated(microbatch: Sequence[Sequence[Sample]], device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Per specialist (B, T) ids and where the NEXT token is a response token; (N,) those tokens."""
    every_ids, every_mask = [], []
    for samples in microbatch:
        lengths = [len(sample.prompt) + len(sample.response) for sample in samples]
        ids = torch.zeros(len(samples), max(lengths), dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            ids[i, :length] = torch.tensor(sample.prompt + sample.response)
            mask[i, len(sample.prompt) - 1 : length - 1] = True
        every_ids.append(ids.to(device))
        every_mask.append(mask.to(device))
    target = torch.tensor([token for sample in microbatch[0] for token in sample.response], dtype=torch.long).to(device)
    return every_ids, every_mask, target


def batches(
    samples: dict[str, list[list[Sample]]], per_class: int, microbatch: int
) -> Iterator[list[list[list[Sample]]]]:
    """Endless steps of ``per_class`` samples of each class, as microbatches. samples: class -> specialist -> sample."""
    start = 0
    while True:
        picked = [
            [of_specialist[(start + i) % len(of_specialist)] for of_specialist in by_specialist]
            for by_specialist in samples.values()
            for i in range(per_class)
        ]  # (sample of the batch, specialist)
        yield [
            [list(of_specialist) for of_specialist in zip(*picked[first : first + microbatch], strict=True)]
            for first in range(0, len(picked), microbatch)
        ]
        start += per_class
