"""BTX, Branch-Train-MiX (Sukhbaatar et al. 2024): the specialists' feed-forward parts as a mixture of experts.

In every layer a router, which is new, sends each token to the two experts whose scores are highest; all else is the
average of the specialists. That is Mixtral's architecture, so transformers' class computes it and its name is in
config.json. Then everything is trained on the fused model's data, with the published loss that balances experts,

    alpha N sum_i u_i p_i,    u_i the mean weight that expert i gets, p_i the mean of its softmax score,

over a microbatch, in every layer, N the number of experts and alpha 0.01. The router begins as transformers begins a
Mixtral's: normal, of deviation ``initializer_range``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, MixtralConfig

from ultrafuser_mega.baselines.folder import Account
from ultrafuser_mega.baselines.heldout import Model, load_model, response_logits
from ultrafuser_mega.baselines.ingredients import Ingredients
from ultrafuser_mega.baselines.merging import combined
from ultrafuser_mega.baselines.tuned import opened, tuned_config, write_tuned
from ultrafuser_mega.baselines.tuning import MicroLoss, Tuning, row_losses, tune
from ultrafuser_mega.checkpoint.unfinished import refuse_out
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.shards import SHARD_BYTES, Planned, write_shards
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import read_json_object
from ultrafuser_mega.reporting.records import SUMMARY_FILE
from ultrafuser_mega.runtime.device import choose_device
from ultrafuser_mega.training.stopping import Stop

TOP_K = 2
ALPHA = 0.01
#: Mixtral's name for a feed-forward matrix -> that of the families it can be made of.
_FEED_FORWARD = {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
_FAMILIES = ("llama", "mistral")
_TAKEN_OVER = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def btx(config: FuserConfig, out: Path, of: Sequence[str], *, resume: bool = False) -> Stop | None:
    """Make the mixture of the specialists ``of``, train it, write the folder ``out``; why it stopped before, if it did.

    Raises:
        InputError: they cannot be mixed, or the run cannot begin, go on or be written.
        DivergedError: training ruined the numbers.
    """
    refuse_out(out)
    run_config = tuned_config(config, "btx")
    plan, store = opened(run_config)
    ingredients = Ingredients.of({name: run_config.folders[name] for name in of}, plan.vocab_size)
    like, experts = of[0], len(of)
    if experts < 2:
        raise InputError(f"--of {like}: a mixture needs two experts at least")
    identity = {"experts": list(of), "top_k": TOP_K, "alpha": ALPHA}
    run = Tuning(run_config, store, (like,), identity, f"mixture of {experts} experts")
    device = choose_device(run_config.device)
    run_config.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run_config.runs, prefix=f".{run_config.name}-") as start:
        write_mixture(Path(start), ingredients, run_config.seed)
        model = load_model(Path(start), device)

    def loss_of(model: Model, batch: MicroBatch) -> MicroLoss:
        output = response_logits(model, batch, like, plan.vocab_size, output_router_logits=True)
        rows = row_losses(output.logits[0].float(), batch.targets, run_config.loss)
        return MicroLoss(rows, ALPHA * balance(output.router_logits, TOP_K))

    if stop := tune(model, run, loss_of, resume=resume):
        return stop
    names = ", ".join(of)
    words = (
        f"The feed-forward parts of {names} as a mixture of experts with a router of tokens (top {identity['top_k']}),"
    )
    words += " all else averaged, then trained on the fused model's data (BTX, Sukhbaatar et al. 2024)."
    account = Account("btx", words, run_config, like, identity, dict(ingredients.folders), ingredients.notices)
    write_tuned(out, model, account, read_json_object(run_config.run_dir / SUMMARY_FILE), plan.vocab_size)
    return None


def balance(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """The balancing loss without alpha, () summed over layers; each gives its router's logits (T, N)."""
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        scores = logits.float().softmax(1)
        top, places = scores.topk(top_k, dim=1)
        weights = torch.zeros_like(scores).scatter(1, places, top / top.sum(1, keepdim=True))
        total = total + scores.shape[1] * (weights.mean(0) * scores.mean(0)).sum()
    return total


def mixtral_config(ingredients: Ingredients) -> MixtralConfig:
    """The mixture's configuration: the first specialist's, with an expert for each.

    Raises:
        InputError: its family has what Mixtral has not.
    """
    (first, folder), *_ = ingredients.folders.items()
    family = ingredients.architecture.family
    if family not in _FAMILIES:
        raise InputError(
            f"specialists.{first}: {family} models have biases or norms that Mixtral has not, as which the mixture is "
            f"computed; specialists of the families {', '.join(_FAMILIES)} can be mixed"
        )
    own = AutoConfig.from_pretrained(folder)
    fields: dict[str, Any] = {name: getattr(own, name) for name in _TAKEN_OVER if hasattr(own, name)}
    experts = len(ingredients.folders)
    return MixtralConfig(
        **fields,
        vocab_size=ingredients.architecture.vocab_rows,
        tie_word_embeddings=ingredients.tied,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        router_aux_loss_coef=ALPHA,
        architectures=["MixtralForCausalLM"],
    )


def write_mixture(folder: Path, ingredients: Ingredients, seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """The mixture before training, as ``MixtralForCausalLM`` reads it, in float32: tensor by tensor."""
    config = mixtral_config(ingredients)
    names = list(ingredients.folders)
    alike = dict.fromkeys(names, 1.0 / len(names))
    sources: dict[str, tuple[str, dict[str, float]]] = {}  # Mixtral's tensor -> the specialists' and their weights
    for tensor in ingredients.shapes:
        layer, found, matrix = tensor.partition(".mlp.")
        if not found:
            sources[tensor] = (tensor, alike)
            continue
        mixtral = next(own for own, theirs in _FEED_FORWARD.items() if f"mlp.{matrix}" == f"{theirs}.weight")
        for number, name in enumerate(names):
            sources[f"{layer}.block_sparse_moe.experts.{number}.{mixtral}.weight"] = (tensor, {name: 1.0})
    planned = {name: Planned(ingredients.shapes[source], torch.float32) for name, (source, _) in sources.items()}
    routers = {
        f"model.layers.{layer}.block_sparse_moe.gate.weight": layer for layer in range(ingredients.architecture.layers)
    }
    router = Planned((len(names), ingredients.architecture.hidden_size), torch.float32)

    def read(name: str) -> Tensor:
        if name in routers:
            generator = torch.Generator().manual_seed(seed + routers[name])
            return torch.randn(router.shape, generator=generator) * config.initializer_range
        source, coefficients = sources[name]
        return combined(ingredients, coefficients, source).float()

    write_shards(folder, planned | dict.fromkeys(routers, router), read, "mixture", shard_bytes)
    config.dtype = torch.float32
    config.save_pretrained(folder)
