"""transformers' text-generation pipeline, whose conversations every specialist reads in its own chat template.

This file travels with the model; it imports nothing but transformers. Texts are continued as in any other model.
"""

from __future__ import annotations

from typing import Any

from transformers import TextGenerationPipeline


class UltraFuserPipeline(TextGenerationPipeline):
    """``pipeline("text-generation", FOLDER, trust_remote_code=True)``."""

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        """One batch; ``prompt_text`` is what was asked, a text or transformers' wrapper of a conversation."""
        asked = model_inputs["prompt_text"]
        conversations = [getattr(one, "messages", None) for one in (asked if isinstance(asked, list) else [asked])]
        if None not in conversations:
            model: Any = self.model
            own = model.chat_inputs(conversations, self.tokenizer)
            first = model.names[0]
            model_inputs["input_ids"] = own["specialist_input_ids"][first]
            model_inputs["attention_mask"] = own["specialist_attention_mask"][first]
            generate_kwargs |= own
        return super()._forward(model_inputs, **generate_kwargs)
