"""Log-likelihoods of continuations under every rule of mixing, against a float64 loop without cache or batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engines import decode, engine_of
from support.release_prompts import of_row, random_ids
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.mixing import RULES
from ultrafuser_mega.inference.scoring import Continued, Scorer

# Two questions with three options each, one with one; a long common beginning in the first two.
PREAMBLE = random_ids(20, seed=7)
CONTEXTS = [{name: [*PREAMBLE, *ids] for name, ids in of_row(row).items()} for row in (0, 1)] + [of_row(2)]
TAILS = [(0, 5), (0, 1), (0, 3), (1, 1), (1, 4), (1, 2), (2, 6)]
REQUESTS = [
    Continued(CONTEXTS[context], random_ids(length, seed=50 + number)) for number, (context, length) in enumerate(TAILS)
]
ROWS = [number for number, (context, _) in enumerate(TAILS) if context < 2]


def own_log_probabilities(reference: Any, request: Continued) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of every specialist: logits (n, t, V), gate weights (t, n), prompt's mean (n,), response so far (t, n)."""
    t, logits, means, sofar = len(request.continuation), [], [], []
    tail = torch.tensor(list(request.continuation))
    whole = {name: [*ids, *request.continuation[:-1]] for name, ids in request.context.items()}
    weights = reference(whole, t)[1]
    for name, specialist in reference.specialists.items():
        every = specialist(whole[name]) @ specialist.weights["lm_head.weight"][: reference.vocab_size].T
        prompt = torch.tensor(list(request.context[name]))
        likely = every[: len(prompt) - 1].log_softmax(-1).gather(1, prompt[1:, None])[:, 0]
        means.append(likely.mean() if len(prompt) > 1 else likely.new_zeros(()))
        logits.append(every[-t:])
        own = every[-t:].log_softmax(-1).gather(1, tail[:, None])[:, 0]
        sofar.append(own.cumsum(0) - own)
    return torch.stack(logits), weights, torch.stack(means), [torch.stack(sofar, dim=1)]


def expected(reference: Any, rule: str, request: Continued) -> tuple[float, bool]:
    logits, gate, means, (sofar,) = own_log_probabilities(reference, request)
    n, t, _ = logits.shape
    hard = torch.eye(n, dtype=torch.float64)
    shortest = min(map(len, request.context.values()))
    posterior = means * shortest + sofar
    posterior[torch.arange(t), posterior.argmin(1)] = float("-inf")  # two of three
    weights = {
        "gate": gate,
        "top1": hard[gate.argmax(1)],
        "held": gate[:1].expand(t, n),
        "leader": hard[gate[:1].argmax(1)].expand(t, n),
        "uniform": torch.full((t, n), 1 / n, dtype=torch.float64),
        "probabilities": torch.full((t, n), 1 / n, dtype=torch.float64),
        "btm": posterior.softmax(1),
        "perplexity": means.softmax(0).expand(t, n),
    }[rule]
    if rule in ("probabilities", "btm"):
        scores = torch.einsum("tn,ntv->tv", weights, logits.softmax(-1)).log()
    else:
        scores = torch.einsum("tn,ntv->tv", weights, logits)
    tail = torch.tensor(list(request.continuation))
    total = scores.log_softmax(-1).gather(1, tail[:, None]).sum().item()
    return total, bool((scores.argmax(-1) == tail).all())


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_the_likelihoods_of_its_definition(model: Any, reference: Any, close: Any, rule: str) -> None:
    found = dict(Scorer(model, RULES[rule], batch_tokens=100).score(REQUESTS))
    assert sorted(found) == list(range(len(REQUESTS)))
    for number, request in enumerate(REQUESTS):
        total, greedy = expected(reference, rule, request)
        # A logit is off by r, its log-softmax by 2 r; posteriors sum that over all tokens, and a weight moves a logit
        # by at most its change times the logits' spread, which is below 10 here.
        tokens = len(request.continuation) + max(map(len, request.context.values()))
        assert abs(found[number].total - total) < 2 * close["atol"] * tokens * 10
        assert found[number].greedy == greedy


def test_what_the_engine_chooses_is_greedy_under_the_same_rule(model: Any) -> None:
    for rule in RULES.values():
        answer = decode(engine_of(model, rule), [CONTEXTS[0]], 6)[0]
        request = Continued(CONTEXTS[0], answer)
        assert next(Scorer(model, rule).score([request]))[1].greedy
        other = Continued(CONTEXTS[0], [*answer[:-1], answer[-1] ^ 1])
        assert not next(Scorer(model, rule).score([other]))[1].greedy


def test_batches_of_any_size_give_the_same_likelihoods(model: Any, close: Any) -> None:
    together = dict(Scorer(model, batch_tokens=10_000).score(REQUESTS))
    alone = dict(Scorer(model, batch_tokens=1).score(REQUESTS))
    for number, likelihood in together.items():
        assert abs(likelihood.total - alone[number].total) < 4 * close["atol"] * len(REQUESTS[number].continuation)


def test_what_contexts_have_in_common_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    last_hidden = model.last_hidden

    def counted(name: str, ids: Tensor, *rest: Any) -> Tensor:
        read.append((name, ids.numel()))
        return last_hidden(name, ids, *rest)

    monkeypatch.setattr(model, "last_hidden", counted)
    list(Scorer(model, batch_tokens=10_000).score([REQUESTS[number] for number in ROWS]))
    text = [count for name, count in read if name == "text"]
    assert text == [len(PREAMBLE) + 4, 9, 4 * 4]  # one question, what is new of the other, the longer tails padded


def test_a_request_that_is_longer_than_a_specialist_reads_is_refused(model: Any) -> None:
    positions = model.config.specialist_config("text").max_position_embeddings
    long = Continued(CONTEXTS[0], [5] * positions)
    with pytest.raises(InputError, match=rf"tokens are more than the {positions} that text reads"):
        list(Scorer(model).score([long]))
