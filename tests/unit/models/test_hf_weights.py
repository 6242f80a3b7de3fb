"""The weights of a Hugging Face folder: what is refused on opening, and every slice against the whole tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.refusal import refusal
from transformers import LlamaForCausalLM

from ultrafuser_mega.models.families.rules import FusedQKV
from ultrafuser_mega.models.hf_folder import HFWeights, read_architecture
from ultrafuser_mega.toy import tiny_llama


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


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
