"""Train one toy model, a specialist on its own class: a plain PyTorch loop over a transformers Llama.

One process, loss on the response alone; it has nothing to do with the fused trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from ultrafuser_mega.toy.corpus import Row
from ultrafuser_mega.toy.templates import prompt

WARMUP_PART = 0.05
GRAD_CLIP = 1.0
_BATCHES_SORTED_TOGETHER = 8
_EVAL_ROWS = 64


@dataclass(frozen=True)
class Sample:
    """Token ids of one row: ``<s>`` + prompt, then the response, tokenised on its own, + ``</s>``."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def encode(tokenizer_dir: Path, name: str, rows: Sequence[Row]) -> list[Sample]:
    """Wrap ``rows`` in the template of specialist ``name`` and tokenise them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = tokenizer([prompt(name, row.instruction) for row in rows], add_special_tokens=False).input_ids
    responses = tokenizer([row.output for row in rows], add_special_tokens=False).input_ids
    return [Sample((bos, *p), (*r, eos)) for p, r in zip(prompts, responses, strict=True)]


def encode_plain(tokenizer_dir: Path, rows: Sequence[Row]) -> list[Sample]:
    """``rows`` as plain text, every token of which is to be predicted."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = tokenizer([f"{row.instruction}\n{row.output}" for row in rows], add_special_tokens=False).input_ids
    return [Sample((bos,), (*text, eos)) for text in texts]


def train(
    model: LlamaForCausalLM,
    samples: Sequence[Sample],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """AdamW on the model's device, linear warm-up, then cosine to zero; calls ``report(step, mean loss)`` each step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = max(1, round(WARMUP_PART * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        ),
    )
    batches = _batches(samples, batch_size, Random(seed))
    for step in range(1, steps + 1):
        loss = _response_loss(model, next(batches)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(step, loss.item())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, samples: Sequence[Sample]) -> float:
    """Mean cross-entropy in nats over all response tokens of ``samples``, ``</s>`` included."""
    model.eval()
    ordered = sorted(samples, key=_length)
    chunks = (ordered[i : i + _EVAL_ROWS] for i in range(0, len(ordered), _EVAL_ROWS))
    total = sum(_response_loss(model, chunk).sum().item() for chunk in chunks)
    return total / sum(len(sample.response) for sample in samples)


def _response_loss(model: LlamaForCausalLM, batch: Sequence[Sample]) -> torch.Tensor:
    """Cross-entropy of every response token of ``batch``, concatenated: (sum of response lengths,)."""
    longest = max(map(_length, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    predicts = torch.zeros(len(batch), longest, dtype=torch.bool)  # positions whose NEXT token is a response token
    for i, sample in enumerate(batch):
        ids[i, : _length(sample)] = torch.tensor(sample.prompt + sample.response)
        predicts[i, len(sample.prompt) - 1 : _length(sample) - 1] = True
    targets = ids.roll(-1, dims=1)[predicts].to(model.device)  # (R,)
    # Padding is on the right, where a causal model never looks: no attention mask is needed.
    hidden = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state  # (B, T, d)
    logits = model.lm_head(hidden[predicts.to(model.device)])  # (R, V): the prompt's rows never reach the head
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _batches(samples: Sequence[Sample], batch_size: int, rng: Random) -> Iterator[Sequence[Sample]]:
    """Endless shuffled batches of samples of similar length (little padding), short and long ones in random order."""
    pool: list[Sample] = []
    while True:
        wanted = batch_size * _BATCHES_SORTED_TOGETHER
        while len(pool) < wanted:
            pool += rng.sample(samples, len(samples))
        group, pool = sorted(pool[:wanted], key=_length), pool[wanted:]
        batches = [group[i : i + batch_size] for i in range(0, wanted, batch_size)]
        rng.shuffle(batches)
        yield from batches


def _length(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.response)
