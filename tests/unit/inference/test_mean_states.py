"""Vectors of texts do not depend on who they are read with, nor on what stands at padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ultrafuser_mega.inference.mean_states import mean_states
from ultrafuser_mega.inference.model import opened_model

TEXTS = ["What is 12 + 30?", "Paris?", "Write a response that appropriately completes the request, and print it."]


def test_a_text_has_the_mean_of_its_own_states_in_any_batch(release: Path) -> None:
    with opened_model(f"{release}@code", "cpu", "fp32") as opened:
        together = mean_states(opened, TEXTS)
        assert together.shape == (3, opened.model.config.specialist_config("code").hidden_size)
        for text, vector in zip(TEXTS, together, strict=True):
            (prompt,) = opened.model.chat_ids([[{"role": "user", "content": text}]], opened.tokenizer)
            with torch.no_grad():
                states = opened.model.last_hidden("code", torch.tensor([prompt["code"]]))
            np.testing.assert_allclose(vector, states[0].mean(dim=0).numpy(), rtol=0, atol=2e-5)


def test_states_at_padding_count_for_nothing_even_where_they_are_no_numbers(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened_model(f"{release}@text", "cpu", "fp32") as opened:
        wanted = mean_states(opened, TEXTS)
        honest = opened.model.last_hidden

        def spoilt(name: str, ids: Any, mask: Any) -> Any:
            return honest(name, ids, mask).masked_fill(mask.unsqueeze(-1) == 0, torch.nan)

        monkeypatch.setattr(opened.model, "last_hidden", spoilt)
        np.testing.assert_array_equal(mean_states(opened, TEXTS), wanted)


def test_a_fused_models_vectors_are_its_specialists_end_to_end(release: Path) -> None:
    alone = []
    for name in ("text", "code", "math"):
        with opened_model(f"{release}@{name}", "cpu", "fp32") as opened:
            alone.append(mean_states(opened, TEXTS))
    with opened_model(str(release), "cpu", "fp32") as opened:
        fused = mean_states(opened, TEXTS)
    begin = 0
    for part in alone:
        own = fused[:, begin : begin + part.shape[1]]
        np.testing.assert_allclose(own, part / np.linalg.norm(part, axis=1).mean(), rtol=0, atol=1e-5)
        begin += part.shape[1]
    assert begin == fused.shape[1]


def test_a_text_that_a_template_refuses_has_no_vector(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    with opened_model(f"{release}@text", "cpu", "fp32") as opened:
        honest = opened.model.chat_ids

        def strict(conversations: Any, tokenizer: Any) -> Any:
            if "rude" in conversations[0][0]["content"]:
                raise ValueError("be polite")
            return honest(conversations, tokenizer)

        monkeypatch.setattr(opened.model, "chat_ids", strict)
        vectors = mean_states(opened, ["Who?", "Who, rude one?"], told.append)
    assert np.isfinite(vectors[0]).all() and np.isnan(vectors[1]).all()
    assert told == [2]
