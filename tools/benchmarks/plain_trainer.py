"""The same fused model trained by a plain PyTorch script, written the ordinary way, to be timed beside the trainer.

transformers' models, a two-layer gate, the mixed logits of peers.py, F.cross_entropy, autocast and AdamW on fp32
weights. Nothing of the trainer is in here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ultrafuser_mega.toy.training import Sample


class Tokens(NamedTuple):
    """A sample as one specialist reads it: all its ids, and at which places those stand that carry the loss."""

    ids: Sequence[int]
    responses: Sequence[int]

    @classmethod
    def of(cls, sample: Sample) -> Tokens:
        """Of a prompt and a response."""
        ids = sample.prompt + sample.response
        return cls(ids, range(len(sample.prompt), len(ids)))


class AdamW(NamedTuple):
    """The optimizer's settings; weight decay takes matrices."""

    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


class PlainFuser(nn.Module):
    """n causal language models and the gate that weighs their logits, of ``units`` hidden units or a model's width."""

    def __init__(
        self, folders: Mapping[str, Path], dtype: torch.dtype, device: torch.device, units: int | None = None
    ) -> None:
        super().__init__()
        self.members: list[Any] = [
            LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)  # type: ignore[arg-type]
            for folder in folders.values()
        ]
        self.specialists = nn.ModuleList(self.members)
        width = int(self.members[0].config.hidden_size)
        self.device = device
        units = units or width
        self.gate = nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, 1, bias=False)).to(device)

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
    """Steps of one stage.

    Args:
        model: is trained.
        stage: 1 or 2.
        loss: of peers.py.
        compute: dtype of products.
        options: of the optimizer.
    """

    def __init__(
        self,
        model: PlainFuser,
        stage: int,
        loss: Callable[..., Tensor],
        compute: torch.dtype,
        options: AdamW = AdamW(),  # noqa: B008 - cannot change
    ) -> None:
        self.model, self.frozen, self.loss, self.compute = model, stage == 1, loss, compute
        self.device = model.device
        if not self.frozen:
            model.specialists.float()  # what AdamW moves; autocast makes 16 bits of it
        model.specialists.requires_grad_(not self.frozen)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.clip = options.clip
        self.last_loss = torch.zeros((), device=self.device)
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)

    def step(self, microbatches: Sequence[Sequence[Sequence[Tokens]]], lr: float | None = None) -> int:
        """One optimizer step over (microbatch, specialist, sample), at ``lr`` if given; returns the response tokens."""
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        self.last_loss = torch.zeros((), device=self.device)
        total = sum(len(sample.responses) for microbatch in microbatches for sample in microbatch[0])
        for microbatch in microbatches:
            ids, predicts, target = collated(microbatch, self.device)
            with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
                hidden, gate_logits = self.model.inputs(ids, predicts, self.frozen)
                hidden = [states.to(self.compute) for states in hidden]
                heads = [head.to(self.compute) for head in self.model.heads]
                vocab = min(head.shape[0] for head in heads)
                loss = self.loss(hidden, heads, gate_logits, target, vocab_size=vocab, reduction="sum") / total
            loss.backward()
            self.last_loss += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def collated(microbatch: Sequence[Sequence[Tokens]], device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Per specialist (B, T) ids and where the NEXT token is a response token; (N,) those tokens."""
    every_ids, every_mask = [], []
    for samples in microbatch:
        ids = torch.zeros(len(samples), max(len(sample.ids) for sample in samples), dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, sample in enumerate(samples):
            ids[i, : len(sample.ids)] = torch.tensor(sample.ids)
            mask[i, torch.tensor(sample.responses) - 1] = True
        every_ids.append(ids.to(device))
        every_mask.append(mask.to(device))
    target = torch.tensor([sample.ids[place] for sample in microbatch[0] for place in sample.responses]).to(device)
    return every_ids, every_mask, target


def batches(
    samples: dict[str, list[list[Sample]]], per_class: int, microbatch: int
) -> Iterator[list[list[list[Tokens]]]]:
    """Endless steps of ``per_class`` samples of each class, as microbatches. samples: class -> specialist -> sample."""
    start = 0
    while True:
        picked = [
            [Tokens.of(of_specialist[(start + i) % len(of_specialist)]) for of_specialist in by_specialist]
            for by_specialist in samples.values()
            for i in range(per_class)
        ]  # (sample of the batch, specialist)
        yield [
            [list(of_specialist) for of_specialist in zip(*picked[first : first + microbatch], strict=True)]
            for first in range(0, len(picked), microbatch)
        ]
        start += per_class
