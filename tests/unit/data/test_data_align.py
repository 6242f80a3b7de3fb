"""The response tokens of all specialists are the same tokens, whatever stands between them."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chats import as_messages, whole_prompts
from transformers import AutoTokenizer

from ultrafuser_mega.data.align import BEYOND_VOCABULARY, TOO_LONG, UNFIT, Aligned, Aligner, Dropped
from ultrafuser_mega.data.chat_format import JinjaTemplate
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.data.templates import load_template
from ultrafuser_mega.data.tokenizer import check_tokenizers
from ultrafuser_mega.errors import InputError

TEXTS = st.text(st.sampled_from("aParis 12\n\t<s></s>[INST]é😀.:"), min_size=1, max_size=30).filter(str.strip)
CONVERSATIONS = st.builds(
    Conversation,
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4).map(tuple),
    st.none() | TEXTS,
)


def aligner_of(specialists: Any, vocab_size: int, max_length: int = 10_000) -> Aligner:
    encoders = check_tokenizers({name: folder for name, (folder, _) in specialists.items()}, vocab_size)
    templates = {
        name: load_template(template, encoders[name].tokenizer, str(folder))
        for name, (folder, template) in specialists.items()
    }
    return Aligner(encoders, templates, vocab_size, max_length)


@pytest.fixture(scope="module")
def aligner(specialists: Any, vocab_size: Any) -> Aligner:
    return aligner_of(specialists, vocab_size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(CONVERSATIONS, min_size=1, max_size=5), st.integers(2, 300))
def test_sequences_share_responses_hold_one_bos_and_never_pass_max_length(
    aligner: Any, conversations: Any, max_length: Any
) -> None:
    short = Aligner(aligner.encoders, aligner.templates, aligner.vocab_size, max_length)
    eos, bos = aligner.encoders["text"].eos_id, aligner.encoders["text"].bos_id
    for whole, cut in zip(aligner.align(conversations), short.align(conversations), strict=True):
        assert isinstance(whole, Aligned) and not whole.was_cut
        assert all(response[-1] == eos and response.count(eos) == 1 for response in whole.responses)
        for prompts in whole.prompts.values():
            flat = [token for ids in prompts for token in ids]
            assert flat[0] == bos and flat.count(bos) == 1 and eos not in flat
            assert len(prompts) == len(whole.responses)

        first_prompt = max(len(prompts[0]) for prompts in whole.prompts.values())
        if isinstance(cut, Dropped):
            assert cut.reason == TOO_LONG and first_prompt >= max_length
            continue
        lengths = [sum(map(len, prompts)) + sum(map(len, cut.responses)) for prompts in cut.prompts.values()]
        assert max(lengths) <= max_length
        assert cut.responses[:-1] == whole.responses[: len(cut.responses) - 1]
        last, full = cut.responses[-1], whole.responses[len(cut.responses) - 1]
        assert last == full[: len(last)] and last
        assert cut.prompts == {name: prompts[: len(cut.responses)] for name, prompts in whole.prompts.items()}
        assert cut.was_cut == (cut.responses != whole.responses)
        if len(last) < len(full):
            assert max(lengths) == max_length, "a response is cut no shorter than it must be"


@pytest.mark.parametrize("kind", ["first", "bytelevel"])
def test_a_chat_templates_prompts_are_what_transformers_gives_for_generation_at_every_turn(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    conversation = Conversation((("What is 2+2?", "The answer is 4."), ("Print it.", "def add(a, b):\n    return 4")))
    aligner = aligner_of({"one": (folder, "hf")}, len(tokenizer))
    (aligned,) = aligner.align([conversation])
    assert isinstance(aligned, Aligned)
    for turn, trained in enumerate(whole_prompts(aligned)):
        messages = as_messages(conversation, turn)
        assert trained["one"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    # Llama-2's has a space before EOS that no answer has: the second prompt does not go on with the first sequence.
    assert aligned.starts == ((0, 1) if kind == "first" else (0,))


SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q]{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}: {% endif %}{{ m.content }}[/Q]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_a_turn_whose_prompt_does_not_go_on_with_the_sequence_begins_one_for_all_specialists(
    bytelevel: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "mistral"
    shutil.copytree(bytelevel, folder)
    (folder / "chat_template.jinja").write_text(SYSTEM_LAST)
    aligner = aligner_of({"plain": (bytelevel, "ultralm"), "chat": (folder, "hf")}, 500)
    turns = (("one?", "yes"), ("two?", "no"), ("three?", "maybe"))
    system, without = aligner.align([Conversation(turns, "You are brief."), Conversation(turns)])
    assert isinstance(system, Aligned) and isinstance(without, Aligned)
    assert without.starts == (0,) and system.starts == (0, 1, 2)
    assert system.responses == without.responses
    tokenizer = aligner.encoders["plain"].tokenizer
    assert [tokenizer.decode(prompts["chat"]) for prompts in whole_prompts(system)][1:] == [
        "[Q]one?[/Q] yes<|im_end|>[Q]You are brief.: two?[/Q]",
        "[Q]one?[/Q] yes<|im_end|>[Q]two?[/Q] no<|im_end|>[Q]You are brief.: three?[/Q]",
    ]
    assert tokenizer.decode(whole_prompts(system)[1]["plain"]) == (
        "User: You are brief.\n\none?\nAssistant: yes<|im_end|>\nUser: two?\nAssistant:"
    )


def test_a_later_turn_is_trained_though_an_earlier_one_was_cut_where_history_is_shown_shortened(
    bytelevel: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(bytelevel, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    conversation = Conversation((("one?", "<think>" + "x " * 100 + "</think>yes"), ("two?", "no")))
    (cut,) = aligner_of({"chat": (folder, "hf")}, 500, 60).align([conversation])
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(cut, Aligned) and cut.was_cut and cut.starts == (0, 1)
    assert len(cut.prompts["chat"][0]) + len(cut.responses[0]) == 60
    assert tokenizer.decode(cut.prompts["chat"][1]) == (
        "user: one?<|im_end|>assistant: yes<|im_end|>user: two?<|im_end|>assistant: "
    )
    assert tokenizer.decode(cut.responses[1]) == "no<|im_end|>"


def test_of_a_conversation_without_end_no_more_is_read_than_fits(
    bytelevel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    specialists = {"plain": (bytelevel, "ultralm"), "chat": (bytelevel, "hf")}
    aligner = aligner_of(specialists, 500, 1000)
    turns = tuple((f"Which is number {number}?", f"It is {number}.") for number in range(20_001))
    (some,) = aligner.align([Conversation(turns[:200])])
    shown: list[int] = []
    apply = JinjaTemplate.apply

    def counting(self: JinjaTemplate, tokenizer: Any, messages: Any, **options: Any) -> str:
        shown.append(len(messages))
        return apply(self, tokenizer, messages, **options)

    monkeypatch.setattr(JinjaTemplate, "apply", counting)
    (all_of_it,) = aligner.align([Conversation(turns)])
    assert all_of_it == some and isinstance(some, Aligned) and some.was_cut
    fit = len(some.responses)
    assert 16 < fit < 60  # the second 16 have some room
    assert max(shown) < 2 * (fit + 32) and len(shown) <= 2 * (
        fit + 32
    )  # messages of a prompt; prompts, each with markers
    templates = [template for template in aligner.templates.values() if isinstance(template, JinjaTemplate)]
    assert max(map(len, templates[0]._marked)) <= 64


def test_turns_behind_some_that_have_no_room_are_still_found(bytelevel: Any, tmp_path: Path) -> None:
    folder = tmp_path / "forgets"
    shutil.copytree(bytelevel, folder)
    (folder / "chat_template.jinja").write_text(  # thoughts of the last answer stay, others do not
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.index0 >= messages | length - 2 else m.content.split('</think>')[-1] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    long = [("a", "<think>" + "x " * 900 + "</think>z")] * 12
    (found,) = aligner_of({"chat": (folder, "hf")}, 500, 600).align(
        [Conversation((("a", "b"), *long, *[("c", "d")] * 9))]
    )
    assert isinstance(found, Aligned) and len(found.responses) == 2 + 8  # the first long one is cut, 12 have no room
    assert len(found.responses[1]) > 500 and [len(ids) for ids in found.responses[2:]] == [len(found.responses[0])] * 8


def test_a_turn_that_is_not_trained_is_read_as_context(aligner: Any) -> None:
    turns = (("a", "b"), ("c", "d"), ("e", "f"))
    whole, part = aligner.align([Conversation(turns), Conversation(turns, untrained=frozenset({0, 1}))])
    assert part.responses == whole.responses[2:]
    assert whole_prompts(part) == whole_prompts(whole)[2:]


def test_specialists_whose_templates_differ_on_the_space_share_one_answer(bytelevel: Any) -> None:
    size = len(AutoTokenizer.from_pretrained(bytelevel, local_files_only=True))
    both = aligner_of({"chat": (bytelevel, "hf"), "plain": (bytelevel, "ultralm")}, size)
    (aligned,) = both.align([Conversation((("Hi", "Paris"),))])
    assert isinstance(aligned, Aligned)
    piece = both.encoders["chat"].pieces()[aligned.responses[0][0]]
    assert piece.startswith("Ġ"), "a space, since one of them expects it"


def test_a_conversation_that_one_template_cannot_render_is_dropped_and_the_others_stay(
    first: Any, prepend: Any, vocab_size: Any
) -> None:
    aligner = aligner_of({"text": (first, "ultralm"), "code": (prepend, "hf")}, vocab_size)
    with_system = Conversation((("a", "b"),), system="Be brief.")
    dropped, kept = aligner.align([with_system, Conversation((("a", "b"),))])
    assert isinstance(kept, Aligned) and isinstance(dropped, Dropped)
    assert dropped.reason == UNFIT and dropped.detail.startswith("code: the chat template refuses")


def test_a_token_beyond_the_shared_vocabulary_drops_the_conversation(with_pad: Any, vocab_size: Any) -> None:
    conversation = Conversation((("a [PAD]", "b"),))
    aligner = aligner_of({"math": (with_pad, "ultralm")}, vocab_size)
    (kept,) = aligner.align([conversation])
    assert isinstance(kept, Aligned), "a special token's text is ordinary text to a table 9 template"
    small = Aligner(aligner.encoders, aligner.templates, max(kept.prompts["math"][0]), 100)
    (dropped,) = small.align([conversation])
    assert dropped == Dropped(
        BEYOND_VOCABULARY,
        f"prompt of math: id {small.vocab_size}, shared vocabulary {small.vocab_size}",
    )
    tiny = Aligner(aligner.encoders, aligner.templates, max(kept.responses[0]), 100)
    (dropped,) = tiny.align([conversation])
    assert isinstance(dropped, Dropped) and dropped.reason == BEYOND_VOCABULARY
    assert dropped.detail.startswith("response: id")


def test_without_room_for_one_response_token_the_longest_specialist_is_named(aligner: Any) -> None:
    conversation = Conversation((("a", "b"),))
    (whole,) = aligner.align([conversation])
    longest = len(whole.prompts["math"][0])
    assert longest == max(len(prompts[0]) for prompts in whole.prompts.values())
    (dropped,) = Aligner(aligner.encoders, aligner.templates, aligner.vocab_size, longest).align([conversation])
    assert dropped == Dropped(TOO_LONG, f"math: {longest} prompt tokens, max_length {longest}")
    (cut,) = Aligner(aligner.encoders, aligner.templates, aligner.vocab_size, longest + 1).align([conversation])
    assert isinstance(cut, Aligned) and cut.was_cut
    assert cut.responses == [whole.responses[0][:1]]


def test_an_untrained_turn_stands_where_it_stood_and_only_the_others_are_responses(aligner: Any) -> None:
    turns = (("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"))
    whole, part = aligner.align([Conversation(turns), Conversation(turns, untrained=frozenset({0, 2}))])
    assert part.responses == [whole.responses[1], whole.responses[3]] and not part.was_cut
    for name, prompts in part.prompts.items():
        pieces = [ids for turn in zip(whole.prompts[name], whole.responses, strict=True) for ids in turn]
        assert prompts == [[*chain(*pieces[:3])], [*chain(*pieces[4:7])]]
    (last,) = aligner.align([Conversation(turns[:2], untrained=frozenset({1}))])
    assert last.responses == whole.responses[:1] and not last.was_cut, "nothing after the last trained turn is kept"


def test_an_untrained_turn_that_leaves_no_room_for_a_trained_one_makes_the_prompt_too_long(aligner: Any) -> None:
    conversation = Conversation((("a", "b " * 50), ("c", "d")), untrained=frozenset({0}))
    (whole,) = aligner.align([conversation])
    longest = max(len(prompts[0]) for prompts in whole.prompts.values())
    (dropped,) = Aligner(aligner.encoders, aligner.templates, aligner.vocab_size, longest).align([conversation])
    assert dropped == Dropped(TOO_LONG, f"math: {longest} prompt tokens, max_length {longest}")


def test_max_length_must_leave_room_for_a_prompt_and_a_response(aligner: Any) -> None:
    with pytest.raises(InputError, match="max_length is 1; expected at least 2"):
        Aligner(aligner.encoders, aligner.templates, aligner.vocab_size, 1)
