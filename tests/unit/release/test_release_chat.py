"""Conversations reach the released model as the ids that training made of them (ultrafuser_mega/data)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chats import as_messages, whole_prompts
from support.release_folder import PIECES, write_bytelevel_tokenizer, write_release
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ultrafuser_mega.data.align import Aligner, Dropped
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.data.templates import PaperTemplate, load_template
from ultrafuser_mega.data.tokenizer import TextEncoder, check_tokenizers
from ultrafuser_mega.release.chat_ultrafuser import SpecialistEncoder, decode_response, encode_conversation
from ultrafuser_mega.release.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser_mega.toy import tiny_tokenizer

LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PARTS = st.sampled_from([*"aParis 12\n\té😀.:", "[INST]", "<s>", "<|im_end|>"])
TEXTS = st.lists(PARTS, min_size=1, max_size=30).map("".join).filter(str.strip)
CONVERSATIONS = st.builds(
    Conversation, st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4).map(tuple), st.none() | TEXTS
)
QUESTION = [{"role": "user", "content": "Which city is the largest?"}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with tokenizers of three habits: "▁" before every stretch, before the first word alone, never."""
    root = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizer(root / "prepend", pieces=PIECES)
    (root / "prepend" / "chat_template.jinja").write_text(LLAMA2_CHAT)
    shutil.copytree(root / "prepend", root / "first")
    (root / "first" / "tokenizer.json").unlink()  # transformers now converts tokenizer.model by its own rules
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (root / "first" / "tokenizer_config.json").write_text(json.dumps(names))
    write_bytelevel_tokenizer(root / "bytelevel")
    return {kind: root / kind for kind in ("prepend", "first", "bytelevel")}


def both(specialists: dict[str, tuple[Path, str]]) -> Any:
    """The aligner of training, and a function that encodes a conversation with the released code."""
    encoders = check_tokenizers({name: folder for name, (folder, _) in specialists.items()}, PIECES)
    templates = {
        name: load_template(template, encoders[name].tokenizer, str(folder))
        for name, (folder, template) in specialists.items()
    }
    aligner = Aligner(encoders, templates, PIECES, 100_000)
    released = {}
    for name, (folder, _) in specialists.items():
        template = templates[name]
        fields = (
            {"first": template.first, "later": template.later}
            if isinstance(template, PaperTemplate)
            else {"chat_template": template.text}
        )
        released[name] = SpecialistEncoder(AutoTokenizer.from_pretrained(folder), fields)

    def encode(messages: Any) -> Any:
        return encode_conversation(released, messages, aligner.format.lead, aligner.format.end_id, PIECES)

    return aligner, encode


@pytest.mark.parametrize(
    "specialists",
    [
        {"text": ("prepend", "ultralm"), "code": ("first", "codellama"), "math": ("prepend", "wizardmath")},
        {"text": ("first", "ultralm"), "chat": ("prepend", "hf")},
        {"text": ("first", "hf")},
        {"chat": ("bytelevel", "hf"), "text": ("bytelevel", "ultralm")},
        {"chat": ("bytelevel", "hf")},
    ],
    ids=lambda specialists: "-".join(f"{kind}.{template}" for kind, template in specialists.values()),
)
def test_prompts_have_the_ids_that_training_gave_them(tokenizers: Any, specialists: Any) -> None:
    aligner, encode = both({name: (tokenizers[kind], template) for name, (kind, template) in specialists.items()})

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(CONVERSATIONS)
    def check(conversation: Any) -> None:
        (aligned,) = aligner.align([conversation])
        if isinstance(aligned, Dropped):  # a chat template, and a control token in the user's text
            with pytest.raises(ValueError, match="would be read as a control token"):
                encode(as_messages(conversation))
            return
        for turn, trained in enumerate(whole_prompts(aligned)):
            assert encode(as_messages(conversation, turn)) == trained

    check()


def test_golden_pieces_of_llama_tokenizers(tokenizers: Any) -> None:
    """Written down once: a change in how spaces, line breaks, BOS or EOS are split shows here."""
    _, encode = both({"text": (tokenizers["prepend"], "ultralm"), "code": (tokenizers["first"], "codellama")})
    messages = [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello.\n  Yes"},
        {"role": "user", "content": "2 + 3?"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["prepend"])
    pieces = {name: " ".join(tokenizer.convert_ids_to_tokens(ids)) for name, ids in encode(messages).items()}
    assert pieces == {
        "text": "<s> ▁ U s er : ▁ H i ▁the re <0x0A> A s s is t an t : ▁ H el l o . <0x0A> ▁▁ Y es </s> "
        "▁ <0x0A> U s er : ▁ 2 ▁ + ▁ 3 ? <0x0A> A s s is t an t :",
        "code": "<s> ▁ [ I N S T ] ▁ H i ▁the re ▁ [ / I N S T ] ▁ H el l o . <0x0A> ▁▁ Y es </s> "
        "[ I N S T ] ▁ 2 ▁ + ▁ 3 ? ▁ [ / I N S T ]",
    }


@pytest.mark.parametrize("kind", ["prepend", "first", "bytelevel"])
@pytest.mark.parametrize("lead", ["", " "])
def test_the_text_of_a_response_comes_back_from_its_ids(tokenizers: Any, kind: str, lead: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[kind])
    encoder = SpecialistEncoder(tokenizer, {"first": "", "later": ""})
    for text in ("Paris", "two words.", "def f(a):\n    return a", "\n\n  deep", "  deep", "12 + 3", "é😀", "😀"):
        ids = encoder.encode_response(text, lead, tokenizer.eos_token_id)
        assert decode_response(tokenizer, ids, lead) == text


def test_bytes_that_are_no_text_leave_nothing_of_the_anchor_behind(tokenizers: Any) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizers["prepend"])
    broken = tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "H", "i"])
    assert decode_response(tokenizer, broken, " ") == tokenizer.decode(broken)


def test_the_released_tokenizer_is_the_one_of_training_whatever_its_folder_called_it(
    releases: Any, specialists: Any
) -> None:
    for trio, release in releases.items():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(release)
        trained = TextEncoder(specialists[trio]["text"][0]).tokenizer
        assert tokenizer.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (trained.bos_token_id, trained.eos_token_id)
        assert tokenizer.padding_side == "left"


def test_auto_tokenizer_makes_the_same_of_the_release_as_of_the_folder_it_came_from(
    tokenizers: Any, specialists: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "specialist"
    shutil.copytree(specialists["llamas"]["text"][0], folder)
    (folder / "tokenizer.json").unlink()
    shutil.copytree(tokenizers["first"], folder, dirs_exist_ok=True)  # its class converts tokenizer.model by itself
    release = write_release(tmp_path / "release", {"text": (folder, "ultralm")})
    (release / "config.json").unlink()  # or AutoTokenizer asks whether to trust the model's code
    # The class that reads tokenizer.json and nothing else: what LlamaTokenizer does has changed between versions.
    assert json.loads((release / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "  Hi there\n 12 [INST] é😀 </s> x"
    assert (
        AutoTokenizer.from_pretrained(release)(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids
    )


def test_chat_stops_at_stop_strings(models: Any, releases: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(releases["llamas"])
    whole = models["llamas"].chat(QUESTION, tokenizer=tokenizer, max_new_tokens=12)
    stop = next(letter for letter in whole[2:] if letter.isascii() and letter.isalnum())
    stopped = models["llamas"].chat(QUESTION, tokenizer=tokenizer, max_new_tokens=12, stop_strings=[stop])
    assert stop in stopped and len(stopped) < len(whole) and whole.startswith(stopped)


def test_a_tokenizer_that_is_not_the_first_ones_travels_with_its_specialist(
    tokenizers: Any, specialists: Any, tmp_path: Path
) -> None:
    members = dict(specialists["llamas"])
    code = tmp_path / "code"
    shutil.copytree(members["code"][0], code)
    shutil.copytree(tokenizers["first"], code, dirs_exist_ok=True)
    (code / "tokenizer.json").unlink()
    members["code"] = (code, "hf")
    model = UltraFuserForCausalLM.from_pretrained(write_release(tmp_path / "out", members))
    assert [entry.get("tokenizer") for entry in model.config.specialists or []] == [None, "tokenizers/code", None]

    conversation = Conversation((("Say [INST].", "No.\n  Yes."), (" Why?", "...")))
    aligner, _ = both(members)
    (aligned,) = aligner.align([conversation])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    inputs = model.chat_inputs([as_messages(conversation)], tokenizer)
    for name, ids in whole_prompts(aligned)[-1].items():
        assert inputs["specialist_input_ids"][name][0].tolist() == ids

    model.save_pretrained(tmp_path / "again")
    again = UltraFuserForCausalLM.from_pretrained(tmp_path / "again")
    found = again.chat_inputs([as_messages(conversation)], tokenizer)["specialist_input_ids"]
    assert all(torch.equal(found[name], ids) for name, ids in inputs["specialist_input_ids"].items())

    shutil.rmtree(tmp_path / "again" / "tokenizers")
    again = UltraFuserForCausalLM.from_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="has no tokenizers/code, code's tokenizer; copy it from the release folder"):
        again.chat_inputs([QUESTION], tokenizer)


def test_chat_answers_with_the_text_that_generate_gives(model: Any, release: Any, reference: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(release)
    inputs = model.chat_inputs([QUESTION], tokenizer)
    prompts = {name: ids[0].tolist() for name, ids in inputs["specialist_input_ids"].items()}
    assert len({len(ids) for ids in prompts.values()}) > 1, "the templates must differ"
    expected = decode_response(tokenizer, reference.greedy(prompts, 10, eos=2), model.config.response_lead)
    assert expected and model.chat(QUESTION, tokenizer=tokenizer, max_new_tokens=10) == expected

    other = [*QUESTION, {"role": "assistant", "content": "Berlin."}, {"role": "user", "content": "Are there two?"}]
    alone = [model.chat(messages, tokenizer=tokenizer, max_new_tokens=10) for messages in (QUESTION, other)]
    assert model.chat([QUESTION, other], tokenizer=tokenizer, max_new_tokens=10) == alone


def test_tools_that_know_one_template_get_the_first_specialists(releases: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(releases["llamas"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>User: Be brief.\n\nOne?\nAssistant: Yes.</s>\nUser: Two?\nAssistant:"
    code = (releases["llamas"] / "chat_templates" / "code.jinja").read_text()
    rendered = tokenizer.apply_chat_template(messages[1:], chat_template=code, tokenize=False)
    assert rendered == "<s>[INST] One? [/INST] Yes.</s>[INST] Two? [/INST]"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "roles are none"),
        ([{"role": "assistant", "content": "x"}], "user last"),
        ([*QUESTION, *QUESTION], "user and assistant in turn"),
        ([*QUESTION, {"role": "assistant", "content": "x"}], "user last"),
        ([{"role": "user", "content": None}], "content must be text, found NoneType"),
        ([{"role": "user", "content": "<|im_start|>system"}], "<|im_start|>, which would be read as a control token"),
    ],
)
def test_conversations_that_training_would_not_have_seen_are_refused_in_one_line(
    models: Any, releases: Any, messages: Any, words: Any
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(releases["qwens"])
    with pytest.raises(ValueError) as caught:
        models["qwens"].chat(messages, tokenizer=tokenizer)
    assert words in str(caught.value) and "\n" not in str(caught.value)
