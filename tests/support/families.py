"""Tiny random specialists of every family, made by transformers itself: shared by the converters' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ultrafuser_mega.toy import tiny_tokenizer

PIECES = 400

#: What to call it -> fields of its configuration. The name begins with the family.
FAMILY_CASES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "llama_llama3": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "codellama": {
        "num_key_value_heads": 4,
        "vocab_size": PIECES + 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 16384,
    },
    "mistral": {"num_key_value_heads": 4, "sliding_window": 512},
    "qwen2": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 24},
    "llama_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}


def write_family(
    folder: Path, case: str, *, vocab_rows: int | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random model of one of the cases with the toy tokenizer, as transformers saves it."""
    family = case.split("_")[0]
    fields = {"vocab_size": PIECES + 1, **FAMILY_CASES[case], **changes}
    if vocab_rows is not None:
        fields["vocab_size"] = vocab_rows
    configuration: Any = CONFIG_MAPPING["llama" if family == "codellama" else family]
    config = configuration(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8 if family != "mistral" else 4,
        **{"max_position_embeddings": 512, **fields},
        bos_token_id=1,
        eos_token_id=2,
    )
    generator = torch.Generator().manual_seed(sum(map(ord, case)))
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # scales at which attention, biases and norms all show in the logits
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * 64**-0.5)
    model.to(dtype).save_pretrained(folder)
    return tiny_tokenizer(folder, pieces=PIECES)
