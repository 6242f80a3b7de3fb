"""A conversation as a row of data, with where it comes from."""

from __future__ import annotations

from typing import Any

from ultrafuser_mega.synthesis.config import SynthesisConfig
from ultrafuser_mega.synthesis.ledger import Ledger
from ultrafuser_mega.synthesis.responses import Conversation


def row_of(config: SynthesisConfig, ledger: Ledger, of: str, one: Conversation) -> dict[str, Any]:
    """``messages`` as OpenAI has them, which ``ultrafuser prepare`` reads, and ``provenance``."""
    data, instruction = config.classes[of], one.instruction
    messages = [{"role": "system", "content": data.system}] if data.system else []
    served = None
    for said, key in zip(one.said, one.replies, strict=True):
        reply = ledger.find(key)
        assert reply is not None
        served = reply.served
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply.text.strip()}]
    step = config.step(of, "responses")
    provenance = {
        "class": of,
        "id": instruction.id,
        "topic": list(instruction.topic),
        "origin": instruction.origin,
        "parent": instruction.parent,
        "complicated": instruction.simpler is not None,
        "simpler": instruction.simpler,
        "model": config.models[step.model].model,
        "served": served,
        "ledger": {"instruction": list(instruction.keys), "responses": one.replies, "user": one.user_keys},
    }
    return {"messages": messages, "provenance": provenance}
