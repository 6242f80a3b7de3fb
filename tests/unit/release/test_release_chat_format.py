"""Any chat template: what is trained at a turn is what transformers and the release make of the conversation there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chats import as_messages, whole_prompts
from support.release_folder import PIECES, write_bytelevel_tokenizer

from ultrafuser_mega.data.align import Aligner, Dropped
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.data.templates import PAPER_TEMPLATES, load_template
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.release.chat_ultrafuser import SpecialistEncoder, encode_conversation
from ultrafuser_mega.toy import tiny_tokenizer

SYSTEM = {
    "its own message": "{{ 'system: ' + m.content }}ENDING",
    "with the first question": "",
    "with the last question": "",
    "refused": "{{ raise_exception('no system here') }}",
    "fails": "{{ m.content + 1 }}",
    "lost": "",
}
SHOWN_IF = "{% if WHEN and messages[0].role == 'system' %}{{ messages[0].content + ': ' }}{% endif %}"
BEFORE_QUESTION = {
    "with the first question": SHOWN_IF.replace("WHEN", "loop.index0 == 1"),
    "with the last question": SHOWN_IF.replace("WHEN", "loop.last"),
}
LOSE_SYSTEM = ("refused", "fails", "lost")


@dataclass(frozen=True)
class Style:
    """How a template writes a conversation."""

    bos: bool
    system: str
    question: str
    answer: str  # how its text is written
    opening: str  # of an answer
    ending: str  # of a message

    def jinja(self, control: tuple[str, str]) -> str:
        question = self.question.replace("BEFORE", BEFORE_QUESTION.get(self.system, ""))
        text = (
            ("{{ bos_token }}" if self.bos else "")
            + "{% for m in messages %}{% if m.role == 'system' %}"
            + SYSTEM[self.system]
            + "{% elif m.role == 'user' %}"
            + question
            + "{% else %}"
            + self.opening
            + self.answer
            + "ENDING{% endif %}{% endfor %}{% if add_generation_prompt %}"
            + self.opening.rstrip(" ")
            + "{% endif %}"
        )
        ending = {"eos": "{{ eos_token }}", "other": control[1] + "\n", "spaced": " {{ eos_token }}", "text": "\n"}
        return text.replace("ENDING", ending[self.ending]).replace("OPEN", control[0])


STYLES = st.builds(
    Style,
    st.booleans(),
    st.sampled_from([*SYSTEM, "its own message", "with the first question", "with the last question"]),
    st.sampled_from(["OPENuser\nBEFORE{{ m.content }}\n", "[INST] BEFORE{{ m.content | trim }} [/INST]"]),
    st.sampled_from(["{{ m.content }}", "{{ m.content | trim }}", "{{ m.content.split('</think>')[-1] }}"]),
    st.sampled_from(["OPENassistant\n", "\nAssistant: ", "", "<think>\n"]),
    st.sampled_from(["eos", "other", "spaced", "text"]),
)
PARTS = st.sampled_from([*"aParis 12\n\té😀.:", "system", "</think>", "user"])
TEXTS = st.lists(PARTS, min_size=1, max_size=12).map("".join).filter(str.strip)
ODD_TEXTS = TEXTS | TEXTS | TEXTS | TEXTS.map("<|im_end|></s>".__add__)
CONVERSATIONS = st.builds(
    Conversation, st.lists(st.tuples(ODD_TEXTS, TEXTS), min_size=1, max_size=3).map(tuple), st.none() | TEXTS
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizer(root / "pieces", pieces=PIECES)
    (root / "bytes").mkdir()
    write_bytelevel_tokenizer(root / "bytes")
    return {kind: root / kind for kind in ("pieces", "bytes")}


# What opens a role and ends a turn beside EOS; with BOS in the first role, as SmolLM2 has it.
CONTROLS = {"pieces": ("<s>", "<unk>"), "bytes": ("<|im_start|>", "<|endoftext|>")}


@pytest.mark.parametrize("kind", CONTROLS)
@pytest.mark.parametrize("company", [(), ("ultralm",)], ids=["alone", "with ultralm"])
def test_training_transformers_and_the_release_agree_on_every_prompt(
    folders: Mapping[str, Path], kind: str, company: tuple[str, ...]
) -> None:
    encoder = TextEncoder(folders[kind])
    tokenizer = encoder.tokenizer
    if kind == "bytes":
        tokenizer.bos_token = "<|im_start|>"
        encoder.bos_id = tokenizer.bos_token_id
    paper = {name: PAPER_TEMPLATES[name] for name in company}

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(STYLES, st.lists(CONVERSATIONS, min_size=1, max_size=2))
    def check(style: Style, conversations: list[Conversation]) -> None:
        tokenizer.chat_template = style.jinja(CONTROLS[kind])
        template = load_template("hf", tokenizer, "folder")
        templates = {"chat": template, **paper}
        aligner = Aligner(dict.fromkeys(templates, encoder), templates, PIECES, 100_000)
        released = {"chat": SpecialistEncoder(tokenizer, {"chat_template": template.text})}
        for name, own in paper.items():
            released[name] = SpecialistEncoder(tokenizer, {"first": own.first, "later": own.later})
        form = aligner.format
        assert form.end_id == tokenizer.convert_tokens_to_ids(
            CONTROLS[kind][1] if style.ending == "other" else tokenizer.eos_token
        )
        for conversation, aligned in zip(conversations, aligner.align(conversations), strict=True):
            asked = [as_messages(conversation, turn) for turn in range(len(conversation.turns))]
            if isinstance(aligned, Dropped):
                control_token = any(encoder.control_tokens.search(text) for turn in conversation.turns for text in turn)
                assert control_token or (conversation.system and style.system in LOSE_SYSTEM)
                assert "\n" not in aligned.detail
                with pytest.raises(ValueError) as refused:
                    for messages in asked:
                        encode_conversation(released, messages, form.lead, form.end_id, PIECES)
                assert "\n" not in str(refused.value)
                continue
            for messages, trained in zip(asked, whole_prompts(aligned), strict=True):
                own_prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
                assert trained["chat"] == own_prompt
                assert encode_conversation(released, messages, form.lead, form.end_id, PIECES) == trained
            assert all(response[-1] == form.end_id for response in aligned.responses)

    check()
