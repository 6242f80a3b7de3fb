"""The toy tokenizer behaves like Llama-2's, in SentencePiece and in its Hugging Face form alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import tiny_tokenizer
from ultrafuser_mega.toy.corpus import CLASSES, generate
from ultrafuser_mega.toy.templates import CHAT_TEMPLATES, prompt
from ultrafuser_mega.toy.tokenizer import train_sentencepiece, training_documents, write_tokenizer

PIECES = 1024
UNSEEN = "naïve café 東京 🙂\ttab  two   three"


@pytest.fixture(scope="module")
def rows() -> Any:
    return {name: generate(name, seed=0, train_rows=300, heldout_rows=0).train for name in CLASSES}


@pytest.fixture(scope="module")
def model(rows: Any) -> Any:
    return train_sentencepiece(training_documents(rows), pieces=PIECES)


@pytest.fixture(scope="module")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("tokenizers")
    for name in CLASSES:
        write_tokenizer(root / name, model, chat_template=CHAT_TEMPLATES[name], max_length=2048)
    return {name: root / name for name in CLASSES}


@pytest.fixture(scope="module")
def tokenizer(folders: Any) -> Any:
    return AutoTokenizer.from_pretrained(folders["text"], local_files_only=True)


def test_specials_have_llamas_ids_and_there_is_no_pad(tokenizer: Any) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token is None
    assert len(tokenizer) == PIECES
    assert tokenizer("The")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The answer is 12.", ["▁The", "▁answer", "▁is", "▁", "1", "2", "."]),  # dummy prefix; digits alone
        ("is\n\nis", ["▁is", "<0x0A>", "<0x0A>", "is"]),  # newline is a byte, and takes no prefix after it
        ("def\n    return x", ["▁def", "<0x0A>", "▁▁▁▁", "return", "▁x"]),  # four spaces, one piece
        ("é", ["▁", "<0xC3>", "<0xA9>"]),  # a character never seen falls back to its bytes
        ("", []),
    ],
)
def test_spacing_is_that_of_llama_2(tokenizer: Any, text: Any, pieces: Any) -> None:
    assert tokenizer.tokenize(text) == pieces


@pytest.mark.parametrize("name", CLASSES)
def test_a_response_tokenised_alone_continues_the_prompt_as_running_text_would(
    tokenizer: Any, rows: Any, name: Any
) -> None:
    for row in rows[name][:50]:
        head = prompt(name, row.instruction)
        together = tokenizer(f"{head} {row.output}").input_ids
        assert tokenizer(head).input_ids + tokenizer(row.output, add_special_tokens=False).input_ids == together


def test_hugging_face_ids_equal_sentencepiece_ids(tokenizer: Any, model: Any, rows: Any) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [UNSEEN, " leading", "trailing ", *(row.output for name in CLASSES for row in rows[name])]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text), text


def test_decoding_gives_the_text_back(tokenizer: Any, rows: Any) -> None:
    for text in (UNSEEN, *(row.output for name in CLASSES for row in rows[name])):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("name", CLASSES)
def test_chat_template_gives_one_bos_the_prompt_and_the_trained_response(folders: Any, rows: Any, name: Any) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folders[name], local_files_only=True)
    row = rows[name][0]
    asked = [{"role": "user", "content": row.instruction}]
    answered = [*asked, {"role": "assistant", "content": row.output}]
    expected = tokenizer(prompt(name, row.instruction)).input_ids
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == expected
    response = tokenizer(row.output, add_special_tokens=False).input_ids
    full = [*expected, *response, tokenizer.eos_token_id]
    assert tokenizer.apply_chat_template(answered)["input_ids"][: len(full)] == full
    assert full.count(tokenizer.bos_token_id) == 1


def test_training_is_repeatable(model: Any, rows: Any) -> None:
    assert train_sentencepiece(training_documents(rows), pieces=PIECES) == model


def test_a_vocabulary_too_small_for_the_characters_is_refused(rows: Any) -> None:
    with pytest.raises(InputError, match=r"^pieces = 270: "):
        train_sentencepiece(training_documents(rows), pieces=270)


def test_tiny_tokenizer_has_the_size_asked_for(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "tiny", pieces=400)
    assert len(AutoTokenizer.from_pretrained(folder, local_files_only=True)) == 400
