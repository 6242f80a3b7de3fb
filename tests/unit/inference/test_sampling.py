"""Choices: OpenAI's penalties by their definition, noise that is uniform and the same wherever it is asked for."""

from __future__ import annotations

import math

import pytest
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.noise import draw_key, gumbel
from ultrafuser_mega.inference.sampling import Place, Sampling, choose

CPU = torch.device("cpu")


def chosen(scores: torch.Tensor, sampling: Sampling, answer: list[int], position: int = 0) -> int:
    return int(choose(scores[None].clone(), [Place(sampling, 0, position, [0], answer)])[0])


def test_penalties_count_the_answer_alone_and_bias_adds_to_a_logit() -> None:
    scores = torch.tensor([3.0, 2.5, 2.0, 1.0])
    assert chosen(scores, Sampling(presence_penalty=0.6), answer=[]) == 0  # the prompt's 0 does not count
    assert chosen(scores, Sampling(presence_penalty=0.6), answer=[0]) == 1
    assert chosen(scores, Sampling(presence_penalty=0.4), answer=[0, 0, 0]) == 0
    assert chosen(scores, Sampling(frequency_penalty=0.4), answer=[0]) == 0
    assert chosen(scores, Sampling(frequency_penalty=0.4), answer=[0, 0]) == 1
    assert chosen(scores, Sampling(logit_bias={3: 2.5, 0: -1.0}), answer=[]) == 3


def test_rows_of_different_settings_are_chosen_as_if_alone() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    settings = [
        Sampling(),
        Sampling(1.0, seed=3),
        Sampling(0.5, top_k=4, seed=3),
        Sampling(repetition_penalty=1.5),
        Sampling(1.0, seed=4, logit_bias={7: 3.0}),
        Sampling(2.0, top_p=0.8, min_p=0.02),
    ]
    places = [Place(sampling, row, row, [1, 2], [3]) for row, sampling in enumerate(settings)]
    together = choose(scores, places).tolist()
    assert together == [int(choose(scores[row : row + 1], [places[row]])[0]) for row in range(6)]


def test_draws_of_a_place_are_always_the_same_and_those_of_others_differ() -> None:
    scores = torch.zeros(1000)
    drawn = {
        (seed, row, position): int(choose(scores[None], [Place(Sampling(1.0, seed=seed), row, position, [0], [])])[0])
        for seed in range(3)
        for row in range(3)
        for position in range(3)
    }
    assert len(set(drawn.values())) > 20
    assert drawn[1, 2, 0] == int(choose(scores[None], [Place(Sampling(1.0, seed=1), 2, 0, [5], [6])])[0])


def test_noise_of_other_keys_and_tokens_is_independent_and_uniform() -> None:
    """Means, correlations and counts within 5 standard deviations of what independent uniform numbers have."""
    keys = [draw_key(seed, row, position) for seed in range(2) for row in range(4) for position in range(32)]
    noise = gumbel(keys, 1024, CPU).double()
    uniform = torch.exp(-torch.exp(-noise))
    assert noise.isfinite().all()
    z = (uniform - 0.5) * math.sqrt(12)
    assert (z.mean(1).abs() * math.sqrt(1024)).max() < 5 and (z.mean(0).abs() * math.sqrt(len(keys))).max() < 5
    for pairs, length in ((z @ z.T, 1024), (z.T @ z, len(keys))):
        off = pairs.fill_diagonal_(0) / math.sqrt(length)
        assert off.abs().max() < 6 and abs(float(off.std()) - 1) < 0.02  # half a million pairs: 6
    counts = torch.histc(uniform, 64, 0, 1)
    assert ((counts - uniform.numel() / 64) ** 2 / (uniform.numel() / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)


def test_drawing_follows_the_softmax() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = 4000 * scores.softmax(0)
    places = [Place(Sampling(1.0, seed=1), row, 0, [0], []) for row in range(4000)]
    counts = choose(scores.expand(4000, -1), places).bincount(minlength=4)
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "--temperature -0.1: expected 0 (greedy) or 0.001 or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0: expected above 0 and at most 1"),
        ({"min_p": 1.5}, "--min-p 1.5"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"presence_penalty": 2.5}, "--presence-penalty 2.5: expected -2 to 2"),
        ({"frequency_penalty": float("nan")}, "--frequency-penalty nan"),
        ({"seed": 2**63}, "--seed 9223372036854775808"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_name_of_their_option(setting: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as error:
        Sampling(**setting)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
