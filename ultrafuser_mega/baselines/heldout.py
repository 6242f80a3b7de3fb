"""Any causal model of transformers on the run's token store: the logits of response tokens, and held-out losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.batches import EvaluationBatches, Shard
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.store import TokenStore

Model = Any  # a causal language model of transformers
States = tuple[Tensor, Tensor]  # hidden states of rows, an output head


def load_model(folder: Path, device: torch.device) -> Model:
    """The model in ``folder``, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    return model.to(device)


def whole_shard(config: FuserConfig, store: TokenStore, *specialists: str) -> Shard:
    """All of the data on one process, in the forms of ``specialists``; packed as the run packs it."""
    return Shard(0, 1, config.microbatch_tokens, specialists, dict.fromkeys(specialists, 1), store.eos_id)


def response_logits(model: Model, batch: MicroBatch, specialist: str, vocab_size: int, **options: Any) -> Any:
    """The model's output over a packed microbatch in the form of ``specialist``; ``logits`` (1, N, vocab_size).

    Positions that begin anew keep transformers' attention within a sample.
    """
    tokens = batch.tokens[specialist]
    output = model(
        input_ids=tokens.ids,
        position_ids=tokens.positions[None],
        use_cache=False,
        logits_to_keep=batch.rows[specialist],
        **options,
    )
    output.logits = output.logits[..., :vocab_size]
    return output


def response_states(model: Model, batch: MicroBatch, specialist: str, vocab_size: int) -> States:
    """Hidden states (N, d) that predict a packed microbatch's response tokens, and the output head (vocab_size, d)."""
    tokens = batch.tokens[specialist]
    body = model.base_model(input_ids=tokens.ids, position_ids=tokens.positions[None], use_cache=False)
    return body.last_hidden_state[0, batch.rows[specialist]], model.get_output_embeddings().weight[:vocab_size]


@torch.no_grad()
def heldout_losses(model: Model, store: TokenStore, config: FuserConfig, specialist: str) -> dict[str, float]:
    """Class -> nats per response token over the run's held-out samples, asked in the form of ``specialist``."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, len(store.class_names), dtype=torch.float64)
    shard = whole_shard(config, store, specialist)
    for batch in EvaluationBatches(store, shard, config.evaluation.samples_per_class):
        placed = batch.to(device)
        logits: Tensor = response_logits(model, placed, specialist, store.vocab_size).logits[0].float()
        losses = cross_entropy(logits, placed.targets, reduction="none").double().cpu()
        sums[0].index_add_(0, batch.row_class, losses)
        sums[1].index_add_(0, batch.row_class, torch.ones_like(losses))
    model.train(was_training)
    means = sums[0] / sums[1]
    return dict(zip(store.class_names, means.tolist(), strict=True))
