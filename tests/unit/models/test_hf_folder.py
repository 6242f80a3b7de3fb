"""Reading a Hugging Face folder: what config.json means, what is refused, and every slice against the whole tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.families import LinearScaling
from ultrafuser_mega.models.families.rules import FusedQKV
from ultrafuser_mega.models.hf_folder import HFWeights, answer_ends, check_parallel_sizes, read_architecture
from ultrafuser_mega.toy import tiny_llama

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 query heads in 4 groups; read only."""
    return tiny_llama(
        tmp_path_factory.mktemp("llama"),
        vocab_rows=72,
        hidden_size=96,
        layers=2,
        heads=8,
        kv_heads=4,
        rope_theta=1e6,
        seed=0,
        dtype=torch.float32,
    )


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**TRANSFORMERS_4, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def open_weights(folder: Path) -> HFWeights:
    return HFWeights(folder, read_architecture(folder))


def keep_half(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: tensors.update({name: tensor}))


def index(**changes: str | int) -> Callable[[Path], None]:
    """An index over one shard, with ``changes`` (tensor -> file)."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        weight_map: dict[str, str | int] = dict.fromkeys(load_file(folder / "shard.safetensors"), "shard.safetensors")
        weight_map |= {name.replace("__", "."): file for name, file in changes.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(keep_half, "model.safetensors: truncated or damaged", id="truncated"),
        pytest.param(as_pickle, "pickle weights are not read, save the model as safetensors", id="pickle"),
        pytest.param(
            index(model__norm__weight="model-00002.safetensors"),
            "model-00002.safetensors: named by the index but missing",
            id="index names a missing file",
        ),
        pytest.param(
            index(extra__weight="shard.safetensors"),
            "index.json: names extra.weight in shard.safetensors, which does not hold it",
            id="index names a missing tensor",
        ),
        pytest.param(
            lambda folder: (
                (folder / "model.safetensors").rename(folder / "model.safetensors.index.json").write_text("{}")
            ),
            "index.json: holds no weight_map",
            id="index without a map",
        ),
        pytest.param(
            index(model__norm__weight=3),
            "index.json: weight_map names 3 for tensor model.norm.weight; expected the name of a file",
            id="index names a number",
        ),
        *(
            pytest.param(
                put("model.norm.weight", torch.ones(96).to(dtype)),
                f"tensor model.norm.weight is {code}; expected fp32, bf16 or fp16 weights: save the model in one of",
                id=code,
            )
            for dtype, code in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64"))
        ),
        pytest.param(
            change_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
            "tensor model.layers.1.mlp.up_proj.weight is missing",
            id="tensor missing",
        ),
        pytest.param(
            put("model.norm.weight", torch.ones(95)),
            "tensor model.norm.weight has shape (95,), config.json calls for (96,)",
            id="wrong shape",
        ),
        pytest.param(
            put("model.layers.2.input_layernorm.weight", torch.ones(96)),
            "holds the tensor model.layers.2.input_layernorm.weight, which config.json does not call for",
            id="layer beyond the configured ones",
        ),
    ],
)
def test_damaged_weights_are_found_on_opening(folder: Path, spoil: Callable[[Path], Any], named: str) -> None:
    spoil(folder)
    message = refusal(open_weights, folder)
    assert message.startswith(str(folder))
    assert named in message


@pytest.mark.parametrize("shards_left", [True, False])
def test_single_file_beside_a_left_over_index_is_what_transformers_loads(folder: Path, shards_left: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    if shards_left:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "shard.safetensors")})
    )
    theirs = LlamaForCausalLM.from_pretrained(folder).get_output_embeddings().weight
    assert torch.equal(open_weights(folder).head(slice(None)), theirs)


def test_rotary_buffer_of_old_files_is_no_surplus(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    put(name, torch.ones(6))(folder)
    open_weights(folder)


def test_sharded_folder_reads_like_a_single_file(llama: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    for key, value in open_weights(llama).layer(1, 0, 2).items():
        assert torch.equal(open_weights(folder).layer(1, 0, 2)[key], value)


def test_embedding_head_and_norm_by_rows(llama: Path) -> None:
    tensors, weights = load_file(llama / "model.safetensors"), open_weights(llama)
    assert torch.equal(weights.embedding(slice(10, 20)), tensors["model.embed_tokens.weight"][10:20])
    assert torch.equal(weights.head(slice(64, 72)), tensors["lm_head.weight"][64:])
    assert torch.equal(weights.final_norm(), tensors["model.norm.weight"])


def test_tied_model_uses_its_embedding_as_head(tmp_path: Path) -> None:
    tiny_llama(
        tmp_path,
        vocab_rows=72,
        hidden_size=32,
        layers=1,
        heads=2,
        kv_heads=1,
        rope_theta=1e4,
        seed=0,
        dtype=torch.float32,
        tie=True,
    )
    tensors, weights = load_file(tmp_path / "model.safetensors"), open_weights(tmp_path)
    assert "lm_head.weight" not in tensors
    assert torch.equal(weights.head(slice(5, 9)), tensors["model.embed_tokens.weight"][5:9])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_of_a_layer_make_up_the_whole(llama: Path, tp: int) -> None:
    """With grouped queries (2 query heads to a key/value head), in Megatron's fused layout."""
    tensors, weights = load_file(llama / "model.safetensors"), open_weights(llama)
    hf = {name.removeprefix("model.layers.1."): t for name, t in tensors.items() if name.startswith("model.layers.1.")}
    shards = [weights.layer(1, rank, tp) for rank in range(tp)]

    def joined(name: str, dim: int) -> torch.Tensor:
        return torch.cat([shard[name] for shard in shards], dim=dim)

    # One block of q heads, k head, v head for each of the 4 groups.
    fused = joined("self_attention.linear_qkv.weight", 0).view(4, 2 * 12 + 12 + 12, 96)
    assert torch.equal(fused[:, :24].reshape(96, 96), hf["self_attn.q_proj.weight"])
    assert torch.equal(fused[:, 24:36].reshape(48, 96), hf["self_attn.k_proj.weight"])
    assert torch.equal(fused[:, 36:].reshape(48, 96), hf["self_attn.v_proj.weight"])
    assert torch.equal(joined("self_attention.linear_proj.weight", 1), hf["self_attn.o_proj.weight"])
    halves = [shard["mlp.linear_fc1.weight"].chunk(2) for shard in shards]  # every shard: its gate rows, its up rows
    assert torch.equal(torch.cat([gate for gate, _ in halves]), hf["mlp.gate_proj.weight"])
    assert torch.equal(torch.cat([up for _, up in halves]), hf["mlp.up_proj.weight"])
    assert torch.equal(joined("mlp.linear_fc2.weight", 1), hf["mlp.down_proj.weight"])
    for shard in shards:
        assert torch.equal(shard["input_layernorm.weight"], hf["input_layernorm.weight"])
        assert torch.equal(shard["pre_mlp_layernorm.weight"], hf["post_attention_layernorm.weight"])


def test_more_ranks_than_groups_share_out_query_heads_and_copy_their_key_and_value_head(llama: Path) -> None:
    tensors, weights = load_file(llama / "model.safetensors"), open_weights(llama)
    q, k, v = (tensors[f"model.layers.0.self_attn.{which}_proj.weight"].view(-1, 12, 96) for which in "qkv")
    for rank in range(8):
        shard = weights.layer(0, rank, 8)["self_attention.linear_qkv.weight"]
        assert torch.equal(shard, torch.cat([q[rank], k[rank // 2], v[rank // 2]]))


@pytest.mark.parametrize("tp", [4, 8])
def test_places_of_a_shards_heads_are_theirs_in_the_whole(llama: Path, tp: int) -> None:
    arch, weights, rule = read_architecture(llama), open_weights(llama), FusedQKV("weight")
    whole = weights.layer(0, 0, 1)[rule.parameter].view(-1, arch.head_dim, arch.hidden_size)
    for rank in range(tp):
        shard = weights.layer(0, rank, tp)[rule.parameter]
        assert torch.equal(whole[rule.places(arch, rank, tp)].flatten(0, 1), shard)


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
