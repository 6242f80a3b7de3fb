"""Random-weight Llamas on disk, and the training loop's loss against transformers' own."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import tiny_llama, tiny_tokenizer
from ultrafuser_mega.toy.corpus import generate
from ultrafuser_mega.toy.training import _batches, encode, heldout_loss, train

SHAPE: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "rope_theta": 1e6, "seed": 5}
PROMPTS = {
    "text": "User: {}\nAssistant:",
    "code": "[INST] {} [/INST]",
    "math": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Response:",
}  # written out again: these must be the paper's, whatever the package says


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_the_folder_loads_with_the_shape_asked_for(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", vocab_rows=113, dtype=torch.bfloat16, **SHAPE)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    config = model.config
    assert model.dtype == torch.bfloat16
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (113, 32, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.intermediate_size % 8 == 0
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_tied_folders_store_one_embedding(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", vocab_rows=113, dtype=torch.float32, tie=True, **SHAPE)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_same_seed_same_weights_and_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    folders = [tiny_llama(tmp_path / name, vocab_rows=64, dtype=torch.float32, **SHAPE) for name in ("a", "b")]
    other = tiny_llama(tmp_path / "c", vocab_rows=64, dtype=torch.float32, **{**SHAPE, "seed": 6})
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (folder.joinpath("model.safetensors").read_bytes() for folder in folders)
    assert first == second != other.joinpath("model.safetensors").read_bytes()


def test_norm_weights_are_not_one_so_that_a_forgotten_norm_shows(tmp_path: Path) -> None:
    tensors = load_file(tiny_llama(tmp_path / "m", vocab_rows=64, dtype=torch.float32, **SHAPE) / "model.safetensors")
    norms = [value for name, value in tensors.items() if "norm" in name]
    assert len(norms) == 5
    assert all(norm.std() > 0.05 for norm in norms)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 36}, "hidden_size = 36: 4 heads"), ({"kv_heads": 3}, "kv_heads = 3: must divide heads = 4")],
)
def test_shapes_that_cannot_work_are_refused(tmp_path: Path, change: Any, message: Any) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        tiny_llama(tmp_path / "m", vocab_rows=64, dtype=torch.float32, **{**SHAPE, **change})


@pytest.mark.parametrize("name", PROMPTS)
def test_heldout_loss_is_transformers_loss_over_the_response_and_eos(
    tmp_path: Path, tokenizer_dir: Any, name: Any
) -> None:
    """Batched, padded and headless here; one unpadded row at a time with -100 labels there."""
    folder = tiny_llama(tmp_path / "m", vocab_rows=512, dtype=torch.float32, **SHAPE)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    rows = generate(name, seed=0, train_rows=12, heldout_rows=0).train
    total, count = 0.0, 0
    for row in rows:
        head = [1, *tokenizer(PROMPTS[name].format(row.instruction), add_special_tokens=False).input_ids]
        response = [*tokenizer(row.output, add_special_tokens=False).input_ids, 2]
        ids, labels = torch.tensor([head + response]), torch.tensor([[-100] * len(head) + response])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(response)
        count += len(response)
    # float32 logits in the loss: eps 6e-8 times values of about 10, averaged
    assert heldout_loss(model, encode(tokenizer_dir, name, rows)) == pytest.approx(total / count, rel=1e-6)


def test_training_lowers_the_loss_and_reports_every_step(tmp_path: Path, tokenizer_dir: Any) -> None:
    folder = tiny_llama(tmp_path / "m", vocab_rows=512, dtype=torch.float32, **SHAPE)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    samples = encode(tokenizer_dir, "math", generate("math", seed=0, train_rows=64, heldout_rows=0).train)
    before, steps = heldout_loss(model, samples), []
    train(model, samples, steps=20, batch_size=8, lr=5e-3, seed=0, report=lambda step, _: steps.append(step))
    assert steps == list(range(1, 21))
    assert heldout_loss(model, samples) < before - 1.0


def test_every_sample_is_seen_once_before_any_is_seen_twice(tokenizer_dir: Any) -> None:
    samples = encode(tokenizer_dir, "text", generate("text", seed=0, train_rows=32, heldout_rows=0).train)
    batches = _batches(samples, 4, Random(0))
    epoch = [sample for _ in range(8) for sample in next(batches)]
    assert sorted(map(hash, epoch)) == sorted(map(hash, samples))
