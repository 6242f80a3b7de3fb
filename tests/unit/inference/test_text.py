"""Streamed text: what was shown is never taken back, and all of it together is the decoded answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ultrafuser_mega.inference.text import TextStream, begun
from ultrafuser_mega.release.chat_ultrafuser import SpecialistEncoder, decode_response

LEADS = {"llamas": " ", "qwens": ""}


@pytest.fixture(scope="session")
def tokenizers(releases: Any) -> Any:
    return {trio: PreTrainedTokenizerFast.from_pretrained(folder) for trio, folder in releases.items()}


def response_ids(tokenizer: Any, text: str, lead: str) -> list[int]:
    """As in training, without EOS."""
    encoder = SpecialistEncoder(tokenizer, {"first": "{instruction}", "later": "{instruction}"})
    return encoder.tokenizer.encode_responses([text], lead)[0]


def streamed(tokenizer: Any, ids: Any, lead: Any, stop: Any = ()) -> tuple[str, TextStream]:
    stream = TextStream(tokenizer, lead, stop)
    shown = ""
    for token in ids:
        shown += "".join(piece.text for piece in stream.push(token))
        if stream.stopped:
            break
    return shown + "".join(piece.text for piece in stream.finish()), stream


@pytest.mark.parametrize("trio", LEADS)
@pytest.mark.parametrize(
    "text",
    [
        "London is the largest city.",
        "    return a + b\n\n  indented",
        "Grüße, 東京 and a 🙂 emoji",
        "a",
        "\n\nstarts with line breaks",
    ],
)
def test_streamed_text_is_the_text(tokenizers: Any, trio: str, text: str) -> None:
    ids = response_ids(tokenizers[trio], text, LEADS[trio])
    shown, stream = streamed(tokenizers[trio], ids, LEADS[trio])
    assert shown == stream.text == decode_response(tokenizers[trio], ids, LEADS[trio])
    if trio == "qwens":  # byte-level: nothing is lost
        assert shown == text


@pytest.mark.parametrize("trio", LEADS)
@given(ids=st.lists(st.integers(3, 390), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_tokens_stream_to_their_decoded_text(tokenizers: Any, trio: str, ids: Any) -> None:
    """Except where bytes are no characters: shown is shown, whatever later bytes make of it."""
    shown, stream = streamed(tokenizers[trio], ids, LEADS[trio])
    assert stream.text == decode_response(tokenizers[trio], ids, LEADS[trio])
    if "\ufffd" not in stream.text:
        assert shown == stream.text


@pytest.mark.parametrize("trio", LEADS)
@pytest.mark.parametrize("stop", [("largest",), ("st ci",), ("nowhere", "is the"), ("L",), (".",)])
def test_a_stop_string_cut_anywhere_by_tokens_never_shows(tokenizers: Any, trio: str, stop: Any) -> None:
    text = "London is the largest city. Berlin is smaller."
    ids = response_ids(tokenizers[trio], text, LEADS[trio])
    shown, stream = streamed(tokenizers[trio], ids, LEADS[trio], stop)
    assert stream.stopped
    assert shown == stream.text == text[: min(text.find(s) for s in stop if s in text)]


@pytest.mark.parametrize("trio", LEADS)
@pytest.mark.parametrize("stop", ["🙂", "京 and", "üße, 東", "a 🙂 e"])
def test_a_stop_string_may_begin_and_end_within_characters_of_many_tokens(
    tokenizers: Any, trio: str, stop: str
) -> None:
    text = "Grüße, 東京 and a 🙂 emoji"
    shown, stream = streamed(tokenizers[trio], response_ids(tokenizers[trio], text, LEADS[trio]), LEADS[trio], (stop,))
    assert stream.stopped and shown == stream.text == text[: text.find(stop)]


def test_the_beginning_of_a_stop_string_is_shown_once_it_leads_nowhere(tokenizers: Any) -> None:
    ids = response_ids(tokenizers["qwens"], "London is the largest", "")
    shown, stream = streamed(tokenizers["qwens"], ids, "", ("largest city",))
    assert shown == "London is the largest" and not stream.stopped


@given(stop=st.text("ab", min_size=1, max_size=24), text=st.text("ab", max_size=40))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_what_may_begin_a_stop_string_is_the_longest_of_its_beginnings_at_the_end(stop: str, text: str) -> None:
    beginnings = [stop[:size] for size in range(len(stop))]
    assert begun(stop, text) == max(len(part) for part in beginnings if text.endswith(part))
    assert begun(text + stop, "c" + text) == len(text)


@pytest.mark.parametrize("trio", LEADS)
def test_a_long_answer_is_decoded_in_windows_and_is_the_same(
    tokenizers: Any, trio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Grüße, 東京 🙂\n\n    return  a + b\t# London is the largest city.\n" * 30
    ids = response_ids(tokenizers[trio], text, LEADS[trio])
    longest = 0

    def counted(tokenizer: Any, ids: Any, lead: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_response(tokenizer, ids, lead)

    stream = TextStream(tokenizers[trio], LEADS[trio])
    with monkeypatch.context() as patch:
        patch.setattr("ultrafuser_mega.inference.text.decode_response", counted)
        shown = "".join(piece.text for token in ids for piece in stream.push(token))
    assert longest < 100 < len(ids)
    shown += "".join(piece.text for piece in stream.finish())
    assert shown == stream.text == decode_response(tokenizers[trio], ids, LEADS[trio])


def test_every_token_has_its_part_of_the_text(tokenizers: Any) -> None:
    ids = response_ids(tokenizers["qwens"], "a 🙂 b", "")
    _, stream = streamed(tokenizers["qwens"], ids, "")
    pieces = stream.pieces()
    assert [piece.token for piece in pieces] == list(range(len(ids)))
    assert "".join(piece.text for piece in pieces) == "a 🙂 b"
    assert "" in [piece.text for piece in pieces]  # bytes of the emoji before its last


@pytest.mark.parametrize("trio", LEADS)
def test_the_token_that_ends_an_answer_has_no_text_even_where_it_is_an_ordinary_one(tokenizers: Any, trio: str) -> None:
    """A chat template may end turns with a token that its tokenizer does not mark as special."""
    ids = response_ids(tokenizers[trio], "Rome is here.", LEADS[trio])
    stream = TextStream(tokenizers[trio], LEADS[trio], (), frozenset({ids[-1]}))
    shown = "".join(piece.text for token in ids for piece in stream.push(token))
    shown += "".join(piece.text for piece in stream.finish())
    assert shown == stream.text == "Rome is here"
    assert stream.ids == ids and [piece.text for piece in stream.pieces()][-1] == ""
