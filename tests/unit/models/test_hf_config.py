"""config.json means here what it means to transformers: which spelling counts, what is left out, what has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import FAMILIES, LinearScaling, Llama3Scaling
from ultrafuser_mega.models.hf_folder import read_architecture, unread_fields

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def write(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(SMALL | fields))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": LINEAR}, id="both"
        ),
        pytest.param({"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "default"}}, id="both, scaling off"),
        pytest.param({"rope_parameters": LINEAR, "rope_scaling": None}, id="scaling null"),
        pytest.param({"rope_parameters": LINEAR, "rope_scaling": {}}, id="scaling empty"),
        pytest.param({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7.0}, id="two thetas"),
        pytest.param({"rope_scaling": LINEAR, "rope_theta": 5e5}, id="theta beside scaling"),
        pytest.param({"rope_scaling": LLAMA3, "max_position_embeddings": 777}, id="original length left out"),
        pytest.param(
            {"rope_scaling": LLAMA3, "max_position_embeddings": 777, "original_max_position_embeddings": 99},
            id="original length outside",
        ),
    ],
)
def test_rotary_settings_are_those_that_transformers_computes_with(tmp_path: Path, fields: dict[str, Any]) -> None:
    arch = read_architecture(write(tmp_path, **fields))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert arch.rope_theta == theirs["rope_theta"]
    expected = {
        "default": lambda: None,
        "linear": lambda: LinearScaling(theirs["factor"]),
        "llama3": lambda: Llama3Scaling(8.0, 1.0, 4.0, theirs["original_max_position_embeddings"]),
    }
    assert arch.rope_scaling == expected[theirs["rope_type"]]()


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_are_left_out_mean_what_the_family_takes_for_them(tmp_path: Path, family: str) -> None:
    """With as many heads as every family's default of key/value heads divides."""
    arch = read_architecture(write(tmp_path, model_type=family, num_attention_heads=32, hidden_size=64))
    theirs = CONFIG_MAPPING[family](**{**SMALL, "num_attention_heads": 32, "hidden_size": 64})
    assert (arch.kv_heads, arch.max_positions) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert arch.head_dim == getattr(theirs, "head_dim", 2)
    assert (arch.norm_eps, arch.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert arch.sliding_window == getattr(theirs, "sliding_window", None)


def test_zero_is_a_value(tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, rms_norm_eps=0.0)).norm_eps == 0.0


def test_fields_that_transformers_has_no_use_for_are_no_reason_to_turn_a_model_away(tmp_path: Path) -> None:
    notes = {
        "_model_name_or_path": "SmolLM2",
        "unk_token_id": 0,
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "unsloth_version": "2024.9",
        "logit_scale": 0.5,
    }
    usual = {"torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "use_cache": True, "bos_token_id": 1}
    plain = read_architecture(write(tmp_path, **usual))
    assert unread_fields(tmp_path) == []
    assert read_architecture(write(tmp_path, **usual, **notes)) == plain
    assert unread_fields(tmp_path) == [f"{tmp_path}/config.json: no effect, as in transformers: {', '.join(notes)}"]


def test_rotary_settings_that_another_spelling_overrides_are_said(tmp_path: Path) -> None:
    write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling=LINEAR)
    assert unread_fields(tmp_path) == [
        f"{tmp_path}/config.json: rope_parameters has no effect beside rope_scaling, as in transformers"
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_causal", False),
        ("return_dict", False),
        ("transformers_weights", "other.safetensors"),
        ("per_layer_config", {"0": {"intermediate_size": 40}}),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 16),
        ("attention_chunk_size", 16),
        ("attention_bias", True),
        ("hidden_act", "relu"),
    ],
)
def test_fields_that_transformers_reads_and_nothing_here_computes_are_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(InputError, match=rf"config\.json: {field} = .* is not supported; supported: ") as caught:
        read_architecture(write(tmp_path, **{field: value}))
    assert "\n" not in str(caught.value)


def test_field_that_a_newer_configuration_class_has_is_accepted_at_its_default_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = CONFIG_MAPPING["llama"]

    class Newer(known):  # type: ignore[misc, valid-type]
        logit_cap: float = 0.0

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llama", Newer)
    assert read_architecture(write(tmp_path, logit_cap=0.0)).layers == 2
    with pytest.raises(InputError, match=r"logit_cap = 30\.0 is not supported; supported: 0\.0"):
        read_architecture(write(tmp_path, logit_cap=30.0))
