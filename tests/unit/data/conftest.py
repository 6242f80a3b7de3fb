"""Tiny tokenizers of the kinds that real specialists have, made once per test session.

`first`      SentencePiece as transformers converts it today: "▁" only before the first word of a text
`prepend`    the same pieces as older Llama-2 files have them: "▁" before every stretch between special tokens
`bytelevel`  byte-level BPE without BOS, with ChatML control tokens, as Qwen has
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from support.rows import write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ultrafuser_mega.data.prepare import prepare_store

WORDS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "### Instruction:\n### Response:\n[INST] [/INST] User: Assistant: Paris is the capital of France.\n"
    "def add(a, b):\n    return a + b\nprint(add(1, 2))\nfor i in range(10):\n        total += i * i\n"
    "What is 12 + 30? The answer is 42. Janet has 3 apples and buys 14 more, so she has 17 apples in all.\n"
    "Which city is the largest? London, Berlin and Rome are cities in Europe. Yes. No. Sure, here is one.\n"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.splitlines() * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=560,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    source = tmp_path_factory.mktemp("sentencepiece")
    (source / "tokenizer.model").write_bytes(model.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    folder = tmp_path_factory.mktemp("first")
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.chat_template = LLAMA2_CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepend(first: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also a tokenizer with a habit of putting BOS in front by itself."""
    folder = tmp_path_factory.mktemp("prepend") / "folder"
    tokenizer = json.loads((first / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    tokenizer["pre_tokenizer"] = None
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    (folder / "chat_template.jinja").write_text(LLAMA2_CHAT)
    return folder


@pytest.fixture(scope="session")
def bytelevel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS.splitlines(keepends=True) * 4, trainer)
    folder = tmp_path_factory.mktemp("bytelevel")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vocab_size(first: Any) -> int:
    """The shared vocabulary of `first` and `prepend`."""
    return len(AutoTokenizer.from_pretrained(first, local_files_only=True))


@pytest.fixture(scope="session")
def with_pad(first: Any, vocab_size: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` with one more token behind the shared vocabulary, as WizardMath has."""
    folder = tmp_path_factory.mktemp("with_pad")
    tokenizer = AutoTokenizer.from_pretrained(first, local_files_only=True)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == vocab_size
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def altered(first: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` with two pieces of its vocabulary swapped."""
    folder = tmp_path_factory.mktemp("altered") / "folder"
    shutil.copytree(first, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.__getitem__)[400:402]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="session")
def specialists(first: Any, prepend: Any, with_pad: Any) -> dict[str, tuple[Path, str]]:
    return {"text": (first, "ultralm"), "code": (prepend, "codellama"), "math": (with_pad, "wizardmath")}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, list[Path]]:
    text = [{"instruction": f"Name city {i}.", "input": "", "output": f"Paris {i}"} for i in range(7)]
    code = [{"prompt": f"add {i}", "completion": f"return {i}"} for i in range(5)]
    math = [
        {
            "messages": [
                {"role": "user", "content": f"{i} + 1?"},
                {"role": "assistant", "content": str(i + 1)},
                {"role": "user", "content": "And twice that?"},
                {"role": "assistant", "content": str(2 * i + 2)},
            ]
        }
        for i in range(6)
    ]
    return {
        "text": [write_rows(tmp_path / "text.json", text, as_array=True)],
        "code": [write_rows(tmp_path / "code.jsonl", code)],
        "math": [write_rows(tmp_path / "math.jsonl", math)],
    }


@pytest.fixture
def prepare(tmp_path: Path, sources: Any, specialists: Any, vocab_size: Any) -> Any:
    def call(**changes: Any) -> Any:
        arguments = {"sources": sources, "specialists": specialists, "vocab_size": vocab_size, "max_length": 400}
        return prepare_store(tmp_path / "store", **{**arguments, **changes})

    return call
