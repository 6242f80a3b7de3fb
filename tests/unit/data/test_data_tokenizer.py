"""Tokenizers with different habits give the same ids, or are refused with the first difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ultrafuser_mega.data.tokenizer import TextEncoder, check_tokenizers, shared_vocab_size
from ultrafuser_mega.errors import InputError


def pieces(encoder: TextEncoder, ids: list[int]) -> list[str]:
    names = encoder.pieces()
    return [names[token] for token in ids]


@pytest.mark.parametrize("kind", ["first", "prepend"])
def test_a_response_behind_a_sentencepiece_prompt_starts_with_one_spaced_piece(
    kind: str, request: pytest.FixtureRequest
) -> None:
    encoder = TextEncoder(request.getfixturevalue(kind))
    texts = ["Paris", " Paris", "\nParis", "    return a", "<s>"]
    encoded = [pieces(encoder, ids) for ids in encoder.encode_responses(texts, " ")]
    assert encoded[0] == encoded[1] == ["▁Paris"]
    assert encoded[2][0] == "<0x0A>" and "".join(encoded[2][1:]) == "Paris"
    assert "".join(encoded[3]) == "▁▁▁▁return▁a"
    assert encoded[4] == ["▁", "<0x3C>", "s", "<0x3E>"], "a control token typed in a response stays text"
    assert all("▁" not in row[:-1] for row in encoded[:3]), "no lone ▁"


@pytest.mark.parametrize("kind", ["first", "prepend"])
def test_without_a_space_before_it_a_sentencepiece_response_has_none(kind: str, request: pytest.FixtureRequest) -> None:
    encoder = TextEncoder(request.getfixturevalue(kind))
    (ids,) = encoder.encode_responses(["Paris"], "")
    assert "".join(pieces(encoder, ids)) == "Paris"


def test_a_bytelevel_response_carries_the_space_only_where_the_template_has_one(bytelevel: Any) -> None:
    encoder = TextEncoder(bytelevel)
    (spaced,), (bare,) = encoder.encode_responses(["Paris"], " "), encoder.encode_responses(["Paris"], "")
    assert "".join(pieces(encoder, spaced)) == "ĠParis"
    assert "".join(pieces(encoder, bare)) == "Paris"


def test_every_first_prompt_has_exactly_one_bos_whatever_the_tokenizer_adds_or_the_text_holds(
    first: Any, prepend: Any, bytelevel: Any
) -> None:
    for folder in (first, prepend):
        encoder = TextEncoder(folder)
        for text in ("User: hi", "<s>User: <s>hi</s>"):
            (ids,) = encoder.encode_first_prompts([text])
            assert ids[0] == encoder.bos_id and ids.count(encoder.bos_id) == 1 and encoder.eos_id not in ids
    encoder = TextEncoder(bytelevel)
    assert encoder.bos_id is None
    (ids,) = encoder.encode_first_prompts(["User"])
    assert "".join(pieces(encoder, ids)) == "User"


@pytest.mark.parametrize(("kind", "expected"), [("first", ["<0x0A>"]), ("prepend", ["▁", "<0x0A>"])])
def test_a_later_prompt_is_split_as_the_tokenizer_itself_does_after_eos(
    kind: Any, expected: Any, request: pytest.FixtureRequest
) -> None:
    encoder = TextEncoder(request.getfixturevalue(kind))
    (ids,) = encoder.encode_later_prompts(["\nUser: hi"])
    whole = encoder.tokenizer("</s>\nUser: hi", add_special_tokens=False).input_ids
    assert ids == whole[1:]
    assert pieces(encoder, ids)[: len(expected)] == expected


def test_specialists_of_one_family_agree_and_come_back_loaded(
    first: Any, prepend: Any, with_pad: Any, vocab_size: Any
) -> None:
    encoders = check_tokenizers({"text": first, "code": prepend, "math": with_pad}, vocab_size)
    assert list(encoders) == ["text", "code", "math"]
    assert encoders["text"].fingerprint() != encoders["math"].fingerprint()
    assert encoders["text"].fingerprint() == TextEncoder(first).fingerprint()


def test_swapped_pieces_are_refused_with_both_names_and_the_first_of_them(
    first: Any, altered: Any, vocab_size: Any
) -> None:
    names = TextEncoder(first).pieces()
    place = next(token for token in range(vocab_size) if TextEncoder(altered).pieces()[token] != names[token])
    with pytest.raises(InputError) as raised:
        check_tokenizers({"text": first, "math": altered}, vocab_size)
    message = str(raised.value)
    assert f"the piece of id {place} is {names[place]!r} for text" in message
    assert str(altered) in message and "\n" not in message


def test_another_family_is_refused(first: Any, bytelevel: Any) -> None:
    with pytest.raises(
        InputError, match=r"tokenizers of text .* and code .* disagree: the BOS id is 1 for text and None"
    ):
        check_tokenizers({"text": first, "code": bytelevel}, 400)


def with_own_tokens(source: Any, folder: Any, *tokens: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


def test_specialists_that_each_added_a_token_of_their_own_are_told_the_vocabulary_that_they_share(
    first: Any, altered: Any, vocab_size: Any, tmp_path: Path
) -> None:
    text = with_own_tokens(first, tmp_path / "text", "<|think|>")
    code = with_own_tokens(first, tmp_path / "code", "<|fim|>", "<|end|>")
    math = with_own_tokens(first, tmp_path / "math", "<|think|>", "<|calc|>")
    with pytest.raises(InputError) as raised:
        check_tokenizers({"text": text, "math": math, "code": code}, vocab_size + 2)
    message = str(raised.value)
    assert f"the piece of id {vocab_size} is '<|think|>' for text and '<|fim|>' for code" in message
    assert message.endswith(f"set vocab_size: {vocab_size}") and "family" not in message
    assert f"({text}, LlamaTokenizer of {vocab_size + 1} tokens)" in message
    assert list(check_tokenizers({"text": text, "math": math, "code": code}, vocab_size)) == ["text", "math", "code"]

    other = with_own_tokens(altered, tmp_path / "other", "<|fim|>")
    with pytest.raises(InputError, match="fusing needs specialists of one tokenizer family"):
        check_tokenizers({"text": text, "code": code, "other": other}, vocab_size + 1)


def test_settings_of_one_tokenizer_that_name_different_ends_are_told_what_to_set(
    bytelevel: Path, tmp_path: Path
) -> None:
    """As Qwen's base models, which end with <|endoftext|>, beside its chat models."""
    base = Path(shutil.copytree(bytelevel, tmp_path / "base"))
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    vocab_size = len(TextEncoder(bytelevel).pieces())
    path.write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    with pytest.raises(InputError) as raised:
        check_tokenizers({"chat": bytelevel, "base": base}, vocab_size)
    eos = settings["eos_token"]
    assert str(raised.value).endswith(
        f"their pieces are the same: set eos_token to {eos!r} in {path}, as chat has it, or the other way round"
    )
    path.write_text(json.dumps(settings | {"eos_token": eos}))
    check_tokenizers({"chat": bytelevel, "base": base}, vocab_size)


def test_a_normaliser_that_rewrites_text_is_refused_with_the_text(first: Any, tmp_path: Path, vocab_size: Any) -> None:
    folder = tmp_path / "folds"
    shutil.copytree(first, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFKC"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # LlamaTokenizer would bring a normaliser of its own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"disagree: token \d+ of 'naïve café.* is .* for text and .* for math"):
        check_tokenizers({"text": first, "math": folder}, vocab_size)


def test_a_control_id_beyond_the_shared_vocabulary_is_refused(first: Any) -> None:
    with pytest.raises(InputError, match="text's EOS id 2 lies beyond the shared vocabulary of 2"):
        check_tokenizers({"text": first}, 2)


def test_folders_without_a_usable_tokenizer_are_named(tmp_path: Path, first: Any) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected one with tokenizer.json"):
        TextEncoder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no tokenizer; add its tokenizer\.json or tokenizer\.model$"):
        TextEncoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"no tokenizer can be loaded from here: .") as raised:
        TextEncoder(tmp_path)
    assert "\n" not in str(raised.value)
    folder = tmp_path / "no_eos"
    shutil.copytree(first, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="the tokenizer has no EOS token; set eos_token"):
        TextEncoder(folder)


def test_the_shared_vocabulary_is_the_smallest_of_the_models(tmp_path: Path) -> None:
    for name, rows in (("text", 32000), ("code", 32016), ("math", 32001)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": rows}))
    folders = {name: tmp_path / name for name in ("text", "code", "math")}
    assert shared_vocab_size(folders) == 32000
    (tmp_path / "math" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"math/config.json: holds no vocab_size for math"):
        shared_vocab_size(folders)
    (tmp_path / "math" / "config.json").write_text('{"vocab_size": "many"}')
    with pytest.raises(InputError, match="vocab_size is 'many'; expected a positive whole number"):
        shared_vocab_size(folders)


def test_a_tokenizer_that_is_a_program_is_refused_without_asking_and_without_running_it(
    first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(first, tmp_path / "folder"))
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(InputError, match=r"folder: its tokenizer is a program \(auto_map in tokenizer_config\.json\)"):
        TextEncoder(folder)
    assert not (tmp_path / "run").exists()
    assert "[y/N]" not in "".join(capfd.readouterr())
