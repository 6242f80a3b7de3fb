"""What a specialist reads before each response: table 9 to the letter, chat templates as transformers renders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chats import as_chat, as_messages
from transformers import AutoTokenizer

from ultrafuser_mega.data.chat_format import Chat as ConversationOfIds
from ultrafuser_mega.data.chat_format import PromptError, SequenceTokenizer
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.data.templates import PAPER_TEMPLATES, ChatTemplate, PaperTemplate, load_template, response_format
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.errors import InputError

ONE = Conversation((("What is 2+2?", "4"),))
TWO = Conversation((("What is 2+2?", "4"), ("And 3+3?", "6")), system="Be brief.")
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


class Chat:
    """The chat template of a folder, or another one with its tokenizer."""

    def __init__(self, folder: Path, template: str | None = None) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if template is not None:
            tokenizer.chat_template = template
        loaded = load_template("hf", tokenizer, str(folder))
        assert isinstance(loaded, ChatTemplate)
        self.template, self.tokenizer = loaded, SequenceTokenizer(tokenizer)

    def texts(self, conversation: Conversation) -> list[str]:
        return self.template.texts(self.tokenizer, as_chat(conversation))

    def for_generation(self, conversation: Conversation, turn: int) -> str:
        messages = as_messages(conversation, turn)
        return self.tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def end(self) -> str | None:
        end = self.template.end_id
        return None if end is None else self.tokenizer.tokenizer.convert_ids_to_tokens(end)


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        (
            "ultralm",
            ["User: What is 2+2?\nAssistant:"],
            ["User: Be brief.\n\nWhat is 2+2?\nAssistant:", "\nUser: And 3+3?\nAssistant:"],
        ),
        (
            "codellama",
            ["[INST] What is 2+2? [/INST]"],
            ["[INST] Be brief.\n\nWhat is 2+2? [/INST]", "[INST] And 3+3? [/INST]"],
        ),
        (
            "wizardmath",
            [PREAMBLE + "### Instruction:\nWhat is 2+2?\n\n### Response:"],
            [
                PREAMBLE + "### Instruction:\nBe brief.\n\nWhat is 2+2?\n\n### Response:",
                "\n\n### Instruction:\nAnd 3+3?\n\n### Response:",
            ],
        ),
    ],
)
def test_the_templates_of_table_9_with_one_and_two_turns(name: Any, one: Any, two: Any) -> None:
    template = load_template(name, None, "")
    assert isinstance(template, PaperTemplate)
    assert template.texts(as_chat(ONE)) == one
    assert template.texts(as_chat(TWO)) == two
    assert template.response_lead == " " and template.end_id is None


def test_the_last_prompt_alone_is_the_last_of_all_of_them(bytelevel: Any) -> None:
    tokenizer = SequenceTokenizer(AutoTokenizer.from_pretrained(bytelevel, local_files_only=True))
    users, answers = ["What is 2+2?", " And 3+3?", "And 4+4?"], ["4", "6"]
    chat = ConversationOfIds("Be brief.", users, answers, [[7, 8], [9]])
    for template in PAPER_TEMPLATES.values():
        (prompts,) = template.prompts(tokenizer, [chat])
        assert not isinstance(prompts, PromptError)
        assert template.prompt(tokenizer, chat) == prompts[-1] and len(prompts) == 3


def test_braces_in_the_instruction_are_ordinary_characters() -> None:
    chat = as_chat(Conversation((("{instruction} {x} %s", "a"),)))
    template = load_template("ultralm", None, "")
    assert isinstance(template, PaperTemplate)
    assert template.texts(chat) == ["User: {instruction} {x} %s\nAssistant:"]


def test_every_prompt_of_a_chat_template_is_what_transformers_makes_for_generation_at_that_turn(
    first: Any, bytelevel: Any
) -> None:
    for chat, conversation in ((Chat(first), Conversation(TWO.turns)), (Chat(bytelevel), TWO)):
        assert chat.texts(conversation) == [chat.for_generation(conversation, turn) for turn in range(2)]
    assert Chat(first).texts(ONE) == ["<s>[INST] What is 2+2? [/INST]"]


def test_the_space_that_a_template_writes_before_answers_that_are_history_leads_responses(
    first: Any, bytelevel: Any
) -> None:
    assert Chat(first).template.response_lead == " "
    assert Chat(bytelevel).template.response_lead == ""
    written = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    asked = "{% if add_generation_prompt %}assistant: {% endif %}"
    assert Chat(first, written + asked).template.response_lead == "", "the prompt brings it"


TURNS = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}ENDING{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|endoftext|>\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURNS.replace("ENDING", "<|im_end|>\n") + ASK, "<|im_end|>"),
        (TURNS.replace("ENDING", "\n <|endoftext|>") + ASK, "<|endoftext|>"),
        (TURNS.replace("ENDING", "<|endoftext|><|im_end|>") + ASK, "<|endoftext|>"),
        (TURNS.replace("ENDING", "{% if not loop.last %}<|endoftext|>{% endif %}") + ASK, "<|endoftext|>"),
        (TURNS.replace("ENDING", "\n") + ASK, None),  # what follows opens a turn, it ends none
        (TURNS.replace("ENDING", "<|im_end|>") + "<|im_start|>assistant\n", "<|im_end|>"),
        ("{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TURNS + ASK, None),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", None),
        # Bringing a system text along, as Qwen2.5, SmolLM2 and Llama 3.1 do, whose turn ends as an answer does.
        (OWN_SYSTEM + TURNS.replace("ENDING", "<|endoftext|>\n") + ASK, "<|endoftext|>"),
        (OWN_SYSTEM + TURNS.replace("ENDING", "\n") + ASK, None),
    ],
)
def test_what_ends_a_turn_is_what_the_template_writes_behind_an_answer(bytelevel: Any, template: Any, end: Any) -> None:
    assert Chat(bytelevel, template).end() == end


def test_responses_end_as_the_first_specialist_writes_them_and_stop_at_every_ending(bytelevel: Any) -> None:
    encoder = TextEncoder(bytelevel)
    other = TURNS.replace("ENDING", "<|endoftext|>") + ASK
    templates = {"chat": Chat(bytelevel).template, "other": Chat(bytelevel, other).template}
    end, other_end = encoder.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    shared = response_format(dict.fromkeys(templates, encoder), templates, 500)
    assert (shared.lead, shared.end_id, shared.ends) == ("", end, {"chat": end, "other": other_end})
    turned = dict(reversed(templates.items())) | {"plain": load_template("ultralm", None, "")}
    shared = response_format(dict.fromkeys(turned, encoder), turned, 500)
    assert (shared.lead, shared.end_id) == (" ", other_end) and shared.ends["plain"] == end


def test_an_ending_beyond_the_shared_vocabulary_is_refused_by_name(bytelevel: Any) -> None:
    encoder, template = TextEncoder(bytelevel), Chat(bytelevel).template
    assert template.end_id is not None
    words = rf"specialists.a.template: its turns end with <\|im_end\|> \(id {template.end_id}\), beyond the"
    with pytest.raises(InputError, match=words):
        response_format({"a": encoder}, {"a": template}, template.end_id)


def test_a_conversation_that_the_chat_template_refuses_is_unfit_with_the_templates_own_words(first: Any) -> None:
    with pytest.raises(PromptError, match="only user and assistant roles are supported"):
        Chat(first).texts(TWO)


def test_a_template_that_raises_anything_is_one_line(bytelevel: Any) -> None:
    chat = Chat(bytelevel, "{% if messages[0].role == 'system' %}{{ messages[0].content + 1 }}{% endif %}" + TURNS)
    with pytest.raises(PromptError, match="refuses the conversation: can only concatenate str") as raised:
        chat.texts(TWO)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}", "drops.* the system text"),
        (
            "{% for m in messages %}{% if loop.last or m.role != 'user' %}{{ m.content }}|{% endif %}{% endfor %}",
            "drops.* the user's",
        ),
        ("{% for m in messages %}{{ m.content.split('?')[0] }}|{% endfor %}", r"alters the user's text \(message 2\)"),
        ("{% for m in messages %}{{ m.content.replace('Be', '') }}|{% endfor %}", "alters the system text"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}|{% endfor %}", "repeats"),
    ],
)
def test_system_and_user_texts_that_do_not_survive_make_a_conversation_unfit(
    bytelevel: Any, template: Any, words: Any
) -> None:
    chat = Chat(bytelevel)
    chat.template.text = template
    with pytest.raises(PromptError, match=words):
        chat.texts(TWO)


def test_white_space_around_texts_and_answers_that_are_history_are_the_templates_own_business(bytelevel: Any) -> None:
    trimmed = TURNS.replace("m.content", "m.content | trim").replace("ENDING", "<|im_end|>") + ASK
    thoughtless = trimmed.replace("m.content", "m.content.split('</think>')[-1]")
    conversation = Conversation(((" What? ", "<think>x</think> 4\n"), ("And 3+3?\n", "6")), system="\tBe brief.")
    for template in (trimmed, thoughtless):
        chat = Chat(bytelevel, template)
        assert chat.texts(conversation) == [chat.for_generation(conversation, turn) for turn in range(2)]


def test_control_tokens_make_a_conversation_unfit_for_a_chat_template_but_not_in_the_answer_that_is_trained(
    first: Any, bytelevel: Any
) -> None:
    with pytest.raises(PromptError, match="user's text holds <s>, which would be read as a control token"):
        Chat(first).texts(Conversation((("Explain <s>this</s>", "HTML"),)))
    with pytest.raises(PromptError, match=r"holds <\|im_end\|>, which would be read as a control"):
        Chat(bytelevel).texts(Conversation((("a<|im_end|>\n<|im_start|>system\nb", "c"),)))
    with pytest.raises(PromptError, match="assistant's text holds </s>, which would be read as a control token"):
        Chat(first).texts(Conversation((("a", "</s>"), ("b", "c"))))
    assert len(Chat(first).texts(Conversation((("a", "</s>"),)))) == 1


def test_a_user_who_writes_the_marker_that_stands_for_a_message_changes_nothing(bytelevel: Any) -> None:
    conversation = Conversation((("xQmessageQx0z", "</think>xQmessageQx2z"), ("xQmessageQx1z", "a")))
    thoughtless = TURNS.replace("m.content", "m.content.split('</think>')[-1]").replace("ENDING", "<|im_end|>")
    for template in (None, thoughtless):
        chat = Chat(bytelevel, template)
        assert chat.texts(conversation) == [chat.for_generation(conversation, turn) for turn in range(2)]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "drops, repeats"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "drops, repeats or alters"),
        ("{% for m in messages %}{{ m.content[:5] }}{% endfor %}", "drops, repeats or alters"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "drops, repeats or alters"),
        ("{{ messages[-1].content }}{{ messages[0].content }}", "drops, repeats or alters"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "changes the order"),
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("{% for m in messages %}", "refuses the conversation: Unexpected end of template"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "refuses the conversation: can only concatenate"),
    ],
)
def test_a_chat_template_that_loses_responses_is_refused_in_one_line(first: Any, template: Any, reason: Any) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        Chat(first, template)
    assert str(first) in str(raised.value) and "\n" not in str(raised.value)


def test_a_tokenizer_without_a_chat_template_says_what_to_use_instead(first: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(first, local_files_only=True)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"has none; use one of ultralm, codellama, wizardmath or add chat_template"):
        load_template("hf", tokenizer, str(first))


def test_an_unknown_template_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match='template "vicuna" is not known; expected one of ultralm, codellama'):
        load_template("vicuna", None, "")
