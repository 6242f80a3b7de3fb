r"""The prompt each specialist was trained with: the three templates of the paper's table 9.

A prompt is ``<s>`` (exactly one) and then the template's text; the response is tokenised on its own
and ``</s>`` follows it. The Jinja forms are what the Hugging Face folders carry: they give the same
token ids as ``<s>`` + prompt, so the folders behave alike in every tool.
"""

from __future__ import annotations

PROMPTS = {
    "text": "User: {instruction}\nAssistant:",
    "code": "[INST] {instruction} [/INST]",  # table 9 writes "<s>[INST] ..": that <s> is the one BOS
    "math": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
}

CHAT_TEMPLATES = {
    "text": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n"
        "{% else %}Assistant: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "code": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "math": (
        "{{ bos_token }}Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
        "{% else %}### Response: {{ m['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:{% endif %}"
    ),
}


def template_of(model: str) -> str:
    """Whose template ``model`` answers under: its own, or, of a model that was taught none, that of "text"."""
    return model if model in PROMPTS else "text"


def prompt(name: str, instruction: str) -> str:
    """The prompt of specialist ``name`` without its BOS token."""
    return PROMPTS[name].replace("{instruction}", instruction)
