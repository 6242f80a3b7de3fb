"""How the specialists' logits become one distribution: the trained gate, and the rules that it is measured against.

R rows are positions whose next token is asked for, n specialists, V entries of the vocabulary. A rule gives every row n
weights w, which add up to 1, and the specialists are mixed either by their logits, sum_j w_j o_j, or by their
probabilities, log sum_j w_j softmax(o_j).

    gate           w of the trained gate at this token: the fused model itself (paper, equation 1)
    top1           the specialist with the largest gate weight at this token, alone
    held           the gate's weights where the prompt ends, kept for the whole answer (routing by sample)
    leader         the specialist with the largest of those, alone
    uniform        1 / n, of the logits
    probabilities  1 / n, of the probabilities
    btm            domain posterior of the text so far, the two largest (Branch-Train-Merge, Li et al. 2022, equation 2;
                   uniform prior), of the probabilities
    perplexity     softmax of minus the log perplexity of the prompt (PackLLM-sim, Mavromatis et al. 2024)

The prompts of two specialists are other tokens, so their likelihoods cannot be compared as sums: the posterior takes
each prompt's mean, times the length of the shortest, and adds the response's tokens, which all share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BTM_EXPERTS = 2


@dataclass(frozen=True)
class Evidence:
    """What a rule may go by.

    Attributes:
        gate: (R, n) float32 weights of the gate at every row; it is all that most rules need.
        at_prompt_end: (R, n) the same where the row's prompt ends.
        state: (R, d) the first specialist's last hidden state there.
        prompt: (R, n) mean log-likelihood of a token of the row's prompt; None where the rule does not read it.
        shortest: (R,) tokens of the row's shortest prompt; None likewise.
        response: (R, n) log-likelihood of the response up to the row; None likewise.
    """

    gate: Tensor
    at_prompt_end: Tensor
    state: Tensor
    prompt: Tensor | None = None
    shortest: Tensor | None = None
    response: Tensor | None = None

    def select(self, index: Tensor) -> Evidence:
        """Of these rows."""
        parts = (self.gate, self.at_prompt_end, self.state, self.prompt, self.shortest, self.response)
        return Evidence(*(None if part is None else part[index.to(part.device)] for part in parts))  # type: ignore[arg-type]

    @classmethod
    def behind(cls, gate: Tensor, rows: Sequence[Evidence]) -> Evidence:
        """For tokens with these gate weights (R, n), each of a row whose evidence, of one token, is given."""
        held = [(row.at_prompt_end, row.state, row.prompt, row.shortest, row.response) for row in rows]
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*held, strict=True)]
        return cls(gate, *columns)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rule:
    """One way of mixing.

    Attributes:
        weights: (R, n) from the evidence.
        of_probabilities: whether probabilities are mixed, not logits.
        reads_text: whether it needs the likelihood of prompt and response under every specialist.
    """

    weights: Callable[[Evidence], Tensor]
    of_probabilities: bool = False
    reads_text: bool = False

    def mix(self, logits: Sequence[Tensor], evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Scores (R, V) float32, whose softmax is the distribution of the next token, and the weights (R, n).

        Args:
            logits: of every specialist (R, V) float32; may be changed in place.
            evidence: of these rows.
        """
        weights = self.weights(evidence)
        columns = weights.split(1, dim=-1)
        if self.of_probabilities:
            terms = [own.log_softmax(-1) + weight.log() for own, weight in zip(logits, columns, strict=True)]
            return torch.stack(terms).logsumexp(0), weights
        mixed = logits[0].mul_(columns[0])
        for own, weight in zip(logits[1:], columns[1:], strict=True):
            mixed.addcmul_(own, weight)
        return mixed, weights


def _largest(weights: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).to(weights.dtype)


def _uniform(evidence: Evidence) -> Tensor:
    return torch.full_like(evidence.gate, 1 / evidence.gate.shape[-1])


def _domain_posterior(evidence: Evidence) -> Tensor:
    assert evidence.prompt is not None and evidence.shortest is not None and evidence.response is not None
    likelihood = evidence.prompt * evidence.shortest[:, None] + evidence.response
    kept = likelihood.topk(min(_BTM_EXPERTS, likelihood.shape[-1]), dim=-1).indices
    outside = torch.full_like(likelihood, float("-inf")).scatter(-1, kept, 0.0)
    return (likelihood + outside).softmax(-1)


def _by_perplexity(evidence: Evidence) -> Tensor:
    assert evidence.prompt is not None
    return evidence.prompt.softmax(-1)


GATE = "gate"
RULES = {
    GATE: Rule(lambda evidence: evidence.gate),
    "top1": Rule(lambda evidence: _largest(evidence.gate)),
    "held": Rule(lambda evidence: evidence.at_prompt_end),
    "leader": Rule(lambda evidence: _largest(evidence.at_prompt_end)),
    "uniform": Rule(_uniform),
    "probabilities": Rule(_uniform, of_probabilities=True),
    "btm": Rule(_domain_posterior, of_probabilities=True, reads_text=True),
    "perplexity": Rule(_by_perplexity, reads_text=True),
}
