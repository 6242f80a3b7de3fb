"""Configurations of small Llamas, and random-weight ones on disk for tests.

Not for training: see training.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ultrafuser_mega.errors import InputError

# transformers' 0.02 suits thousands of channels; at 64 the attention scores would start near zero and learn late.
INIT_STD = 0.08


def llama_config(
    *,
    vocab_rows: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    rope_theta: float,
    rms_norm_eps: float = 1e-5,
    max_positions: int = 2048,
    tie: bool = False,
) -> LlamaConfig:
    """A Llama with Llama-2's proportions: the feed-forward part is 8/3 as wide, rounded up to a multiple of 32.

    Raises:
        InputError: ``heads`` does not divide ``hidden_size`` into even parts, or ``kv_heads`` not ``heads``.
    """
    if hidden_size % (2 * heads):
        raise InputError(
            f"hidden_size = {hidden_size}: {heads} heads with rotary embedding need a multiple of {2 * heads}"
        )
    if heads % kv_heads:
        raise InputError(f"kv_heads = {kv_heads}: must divide heads = {heads}")
    return LlamaConfig(
        vocab_size=vocab_rows,
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size // 12) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        rms_norm_eps=rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope_theta)},
        initializer_range=INIT_STD,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
    )


def tiny_llama(
    out_dir: Path | str,
    *,
    vocab_rows: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    rope_theta: float,
    seed: int,
    dtype: torch.dtype,
    tie: bool = False,
) -> Path:
    """Write an untrained Llama to ``out_dir`` (``config.json``, ``model.safetensors``, ``generation_config.json``).

    Matrices have the scale 1/sqrt(hidden_size), so that attention and logits are far from uniform,
    and the norms' weights are not one: an exchanged head, a wrong theta or a forgotten norm shows in
    the output. Same arguments, same bytes; the caller's random state is left alone.
    """
    config = llama_config(
        vocab_rows=vocab_rows,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        rope_theta=rope_theta,
        tie=tie,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            value = 1.0 + 0.1 * noise if parameter.dim() == 1 else noise * hidden_size**-0.5
            parameter.data = value.to(dtype)
    save_llama(model, Path(out_dir))
    return Path(out_dir)


def save_llama(model: LlamaForCausalLM, folder: Path) -> None:
    """``save_pretrained``, with weights that others may read too (safetensors writes them for their owner alone)."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
