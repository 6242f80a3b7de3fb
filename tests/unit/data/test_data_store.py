"""The store on disk: what is written comes back, and what was damaged since is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser_mega.data.align import Aligned
from ultrafuser_mega.data.store import FORMAT_VERSION, Split, TokenStore
from ultrafuser_mega.data.store_writer import SplitWriter, token_dtype, write_manifest
from ultrafuser_mega.errors import InputError

NAMES = ("text", "code")


def aligned(turns: int, length: int, token: int) -> Aligned:
    prompts = {name: [[token] * (length + place + 1)] * turns for place, name in enumerate(NAMES)}
    return Aligned(prompts, [[token] * length] * turns, False)


def ids(top: int) -> Any:
    return st.lists(st.integers(0, top), min_size=1, max_size=5)


@st.composite
def samples(draw: Any, top: int) -> Any:
    turns = draw(st.integers(1, 3))
    many = st.lists(ids(top), min_size=turns, max_size=turns)
    return Aligned({name: draw(many) for name in NAMES}, draw(many), False)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), vocab_size=st.sampled_from([2, 65536, 65537, 2**32]))
def test_samples_come_back_with_the_smallest_type_that_holds_their_vocabulary(data: Any, vocab_size: Any) -> None:
    batches = data.draw(st.lists(st.lists(samples(vocab_size - 1), max_size=3), max_size=3))
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == (2 if vocab_size <= 65536 else 4)
    with TemporaryDirectory() as folder:
        writer = SplitWriter(Path(folder) / "split", NAMES, dtype)
        for batch in batches:
            writer.add(batch)
        counts = writer.close()
        split = Split(Path(folder) / "split", NAMES, dtype)
        written = [sample for batch in batches for sample in batch]
        assert len(split) == len(written)
        assert counts["response_tokens"] == sum(len(turn) for sample in written for turn in sample.responses)
        for sample, expected in zip(split, written, strict=True):
            assert [turn.tolist() for turn in sample.responses] == expected.responses
            assert {n: [turn.tolist() for turn in turns] for n, turns in sample.prompts.items()} == expected.prompts
        every = np.arange(len(written))
        for name in NAMES:
            assert split.lengths(name, every).tolist() == [sample.length(name) for sample in split]
        assert split.max_lengths(every).tolist() == [max(s.length(n) for n in NAMES) for s in split]
        assert split.response_tokens(every).tolist() == [sample.response_tokens for sample in split]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small store with one class, written without a tokenizer."""
    splits = {}
    for split, count in (("train", 5), ("heldout", 0)):
        writer = SplitWriter(tmp_path / "store" / "text" / split, NAMES, token_dtype(100))
        writer.add([aligned(2, 3, index) for index in range(count)])
        splits[split] = writer.close()
    manifest = {
        "format": FORMAT_VERSION,
        "classes": ["text"],
        "specialists": {name: {} for name in NAMES},
        "vocab_size": 100,
        "max_length": 50,
        "bos_id": 1,
        "eos_id": 2,
        "token_dtype": token_dtype(100).str,
        "splits": {"text": splits},
    }
    write_manifest(tmp_path / "store", manifest)
    return tmp_path / "store"


def test_an_opened_store_knows_its_classes_and_refuses_others(folder: Any) -> None:
    store = TokenStore.open(folder)
    assert (store.class_names, store.specialists, store.vocab_size, store.max_length) == (("text",), NAMES, 100, 50)
    train = store.split("text", "train")
    assert train is store.split("text", "train")
    assert train[-1].index == 4
    with pytest.raises(IndexError, match="sample 5 of 5"):
        train[5]
    assert list(store.split("text", "heldout")) == []
    with pytest.raises(InputError, match='has no class "law"; it has text'):
        store.split("law", "train")
    with pytest.raises(InputError, match='has no split "test"; expected one of train, heldout'):
        store.split("text", "test")


FILES = ("turns.bin", "responses.bin", "response_offsets.bin", "prompts.code.bin", "prompt_offsets.text.bin")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_even_without_verifying_checksums(folder: Any, name: Any, verify: bool) -> None:
    path = folder / "text" / "train" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"train/{name}: damaged: {len(content) - 1} bytes, .* {len(content)};"):
        TokenStore.open(folder, verify=verify)
    path.unlink()
    with pytest.raises(InputError, match=rf"train/{name}: missing from the token store"):
        TokenStore.open(folder, verify=verify)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_when_verifying(folder: Any, name: Any) -> None:
    path = folder / "text" / "train" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    TokenStore.open(folder, verify=False)
    with pytest.raises(InputError, match=rf"train/{name}: damaged: its checksum does not match") as raised:
        TokenStore.open(folder)
    assert "\n" not in str(raised.value)


def test_a_manifest_that_was_edited_cut_or_written_by_another_version_is_refused(folder: Any) -> None:
    path = folder / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"max_length": 50', '"max_length": 51'))
    with pytest.raises(InputError, match=r"manifest.json: damaged: its checksum does not match"):
        TokenStore.open(folder)
    path.write_text(whole[:-20])
    with pytest.raises(InputError, match=r"manifest.json: damaged: it is not valid JSON"):
        TokenStore.open(folder)
    path.write_text(json.dumps({**json.loads(whole), "format": 99}))
    with pytest.raises(InputError, match=rf"manifest.json: format 99, expected {FORMAT_VERSION}"):
        TokenStore.open(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"manifest.json: cannot be read: .*is .*store a token store\?"):
        TokenStore.open(folder)
