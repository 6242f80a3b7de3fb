"""Held-out samples for the token view: the evaluation's numbers beside the texts they belong to."""

from __future__ import annotations

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.reporting.records import EvaluationResult
from ultrafuser_mega.reporting.token_view import TokenSample, token_texts


def token_samples(config: FuserConfig, store: TokenStore, final: EvaluationResult) -> list[TokenSample]:
    """Prompt, tokens, gate weights and losses of the first held-out samples of each class."""
    name, folder = next(iter(config.folders.items()))
    tokenizer = TextEncoder(folder).tokenizer

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    views = []
    for class_name in store.class_names:
        of_class = [sample for sample in final.samples if sample.class_name == class_name]
        for gate in of_class[: config.evaluation.token_views]:
            sample = store.split(class_name, "heldout")[gate.index]
            prompt = str(tokenizer.decode(sample.prompts_of(name)[0].tolist(), skip_special_tokens=True))
            ids = [int(token) for response in sample.responses for token in response]
            tokens = token_texts(ids, decode)
            views.append(
                TokenSample(
                    class_name=class_name, prompt=prompt, tokens=tokens, weights=gate.weights, losses=gate.losses
                )
            )
    return views
