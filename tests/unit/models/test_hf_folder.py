"""Reading a Hugging Face folder: what config.json and generation_config.json mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.refusal import refusal

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import LinearScaling
from ultrafuser_mega.models.hf_folder import answer_ends, check_parallel_sizes, read_architecture

# config.json as transformers 4 wrote it for CodeLlama (rope_theta on top, no head_dim).
TRANSFORMERS_4 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 256,
    "max_position_embeddings": 16384,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 72,
}


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**TRANSFORMERS_4, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Llama-2 came before grouped queries, rope_theta and tying were written out.
OLDER = dict.fromkeys(("num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings"), "absent")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"kv_heads": 2, "rope_theta": 1e6, "rope_scaling": None, "tied": False}),
        (OLDER, {"kv_heads": 6, "rope_theta": 1e4, "rope_scaling": None, "tied": False}),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_theta": 1e6, "rope_scaling": LinearScaling(4.0)}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4}},
            {"rope_theta": 1e6, "rope_scaling": LinearScaling(4.0)},
        ),
        ({"rope_scaling": {"rope_type": "default"}}, {"rope_theta": 1e6, "rope_scaling": None}),
    ],
    ids=["transformers 4", "older", "linear by its old key", "linear by its new key", "default scaling"],
)
def test_config_of_transformers_4_and_older(tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    arch = read_architecture(write_config(tmp_path, **changes))
    assert (arch.layers, arch.hidden_size, arch.ffn_size, arch.vocab_rows) == (2, 96, 256, 72)
    assert (arch.heads, arch.head_dim, arch.norm_eps, arch.max_positions) == (6, 16, 1e-5, 16384)
    assert {field: getattr(arch, field) for field in expected} == expected


def test_config_of_transformers_5(llama: Path) -> None:
    """It keeps theta in rope_parameters and always writes head_dim."""
    assert "rope_theta" not in json.loads((llama / "config.json").read_text())
    arch = read_architecture(llama)
    assert (arch.heads, arch.kv_heads, arch.head_dim, arch.rope_theta) == (8, 4, 12, 1e6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported; supported: 'llama' or 'mistral' or 'qwen2'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters` for 'rope_type'='linear'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "factor of the linear rope scaling = 0; expected a positive",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rope_parameters.rope_type = 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "Missing required keys in `rope_parameters` for 'rope_type'='llama3'",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported; supported: 0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
        ({"layer_types": 3}, "layer_types = 3 is not supported"),
        ({"rms_norm_eps": "abc"}, "Field 'rms_norm_eps' expected float, got str (value: 'abc')"),
        ({"rope_theta": 0}, "rope_theta = 0; expected a positive number"),
        ({"rope_parameters": None, "rope_theta": [1]}, "rope_theta = [1]; expected a positive number"),
        ({"model_type": "qwen2", "pretraining_tp": None, "use_sliding_window": True}, "use_sliding_window = True"),
        ({"model_type": "qwen3", "pretraining_tp": None, "attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_method': 'gptq'}"),
        ({"hidden_size": "absent"}, "lacks the field hidden_size"),
        ({"hidden_size": "96"}, "hidden_size = '96'; expected a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4 does not divide num_attention_heads = 6"),
    ],
)
def test_field_that_would_be_wrong_or_ignored_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    message = refusal(read_architecture, write_config(tmp_path, **changes))
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert named in message


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "{folder}: has no config.json"), ("{", "not valid JSON"), ("[]", "holds a list")],
)
def test_folder_without_a_readable_config(tmp_path: Path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert named.format(folder=tmp_path) in refusal(read_architecture, tmp_path)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(read_architecture, tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: no such folder")


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, "tp = 3 does not divide the 8 attention heads of specialist code; tp of 1, 2, 4, 8 would"),
        (16, 1, "tp = 16 does not divide the 8 attention heads of specialist code; tp of 1, 2, 4, 8 would"),
        (1, 3, "pp = 3 is more than the 2 layers of specialist code; make it smaller"),
    ],
)
def test_parallel_sizes_that_do_not_fit_say_which_would(llama: Path, tp: int, pp: int, message: str) -> None:
    assert message in refusal(check_parallel_sizes, "code", read_architecture(llama), tp, pp)


def test_tp_that_fits_the_heads_but_not_their_groups_says_which_would(tmp_path: Path) -> None:
    """12 heads in 4 groups: six ranks would have a part of one group and a part of the next."""
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 240}
    arch = read_architecture(write_config(tmp_path, **sizes))
    assert refusal(check_parallel_sizes, "code", arch, 6, 1) == (
        "layout: tp = 6 neither divides nor is a multiple of the 4 key/value heads of specialist code; "
        "tp of 1, 2, 4, 12 would"
    )
    check_parallel_sizes("code", arch, 12, 1)


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        ('{"eos_token_id": 2}', [2]),
        ('{"eos_token_id": [2, 7, -1]}', [2, 7]),
        ('{"eos_token_id": null}', []),
        ("{}", []),
        (None, []),
    ],
)
def test_what_ends_answers_is_a_token_several_or_none(tmp_path: Path, content: str | None, ends: list[int]) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    assert answer_ends(tmp_path) == ends


@pytest.mark.parametrize("content", ["", "[1]", '{"eos_token_id": [2, true]}', '{"eos_token_id": "</s>"}'])
def test_damaged_settings_of_generation_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        answer_ends(tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
