"""vLLM's models of the families that can be fused, whose logits leave nothing to choose but the fused model's token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer

from ultrafuser_mega.inference.likely import likeliest
from ultrafuser_mega.inference.mixing import GATE, RULES, Evidence
from ultrafuser_mega.inference.sampling import Place, Sampling, choose
from ultrafuser_mega.inference.vllm.exchange import Following, Leading, Row, open_group
from ultrafuser_mega.inference.vllm.messages import Choice
from ultrafuser_mega.inference.vllm.part import Part
from ultrafuser_mega.release.modeling_ultrafuser import Gate


class FusedSpecialist(nn.Module):
    """Put before a class of vLLM's, whose head and ``compute_logits`` it replaces.

    The first specialist's holds the heads of all and the gate, each cut to its tensor parallel ranks as vLLM cuts a
    head; the others' hold none.
    """

    model: nn.Module

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.part = Part.of(vllm_config.model_config.hf_config)
        self.lm_head = PPMissingLayer()
        if self.part.leads:
            vocabulary = self.part.vocab_size
            self.heads = nn.ModuleDict(
                {name: ParallelLMHead(vocabulary, width) for name, width in self.part.widths.items()}
            )
            self.head_logits = LogitsProcessor(vocabulary)
            self.gate = Gate(self.part.widths, self.part.gate_units, self.part.gate_shared)
        self._runner: Any = None
        self._end: Leading | Following | None = None
        self._masks: dict[int, bytes] = {}
        self._choices: list[Choice] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM's loaders call it."""
        return AutoWeightsLoader(self).load_weights(weights)

    def join(self, runner: Any, host: str, port: int, rows: int, timeout: timedelta) -> None:
        """Begin to fuse.

        Args:
            runner: vLLM's, which knows whose rows it computes.
            host, port: of the store where the engines meet.
            rows: answers under way at a time, at most.
            timeout: for what another engine sends.
        """
        self._runner = runner
        device = next(self.parameters()).device
        self._forced = torch.zeros(rows, self.part.vocab_size, device=device)
        self._last = torch.zeros(rows, dtype=torch.int64, device=device)
        names = list(self.part.widths)
        if len(names) == 1 or get_tp_group().rank_in_group:
            return
        group = open_group(host, port, names.index(self.part.name), len(names), timeout)
        if self.part.leads:
            others = {name: self.part.widths[name] for name in names[1:]}
            self._end = Leading(group, rows, others, next(self.parameters()).dtype)
        else:
            self._end = Following(group, rows)

    def constrain(self, masks: Mapping[int, bytes]) -> None:
        """Which tokens may come next: request -> a bit for each, for those that are not free."""
        self._masks = dict(masks)

    def take_choices(self) -> list[Choice]:
        """What was chosen since this was last asked for; empty but where tokens are chosen."""
        taken, self._choices = self._choices, []
        return taken

    def compute_logits(self, hidden_states: Tensor) -> Tensor:  # (R, d) -> (R, V) float32
        """Zero, and one for the token that the fused model chose."""
        if self._runner is None:  # vLLM measures itself before anybody asks
            return hidden_states.new_zeros(len(hidden_states), self.part.vocab_size, dtype=torch.float32)
        requests = [self._runner.requests[id] for id in self._runner.input_batch.req_ids]
        rows = [(request.sampling_params.extra_args["number"], len(request.output_token_ids)) for request in requests]
        if len(rows) != len(hidden_states):
            raise RuntimeError(f"{len(hidden_states)} hidden states for {len(rows)} requests")
        if self.part.leads:
            tokens = self._choose(hidden_states, rows, requests)
        elif self._end is not None:
            tokens = self._end.tokens(rows, hidden_states).to(hidden_states.device)  # type: ignore[union-attr]
        else:
            tokens = torch.empty(len(rows), dtype=torch.int64, device=hidden_states.device)
        return self._only(get_tp_group().broadcast(tokens))

    def _only(self, tokens: Tensor) -> Tensor:
        """The logits that leave nothing but ``tokens``."""
        count = torch.arange(len(tokens), device=tokens.device)
        everyone = torch.arange(len(self._last), device=tokens.device)
        self._forced[everyone, self._last] = 0
        self._forced[count, tokens] = 1
        self._last[count] = tokens
        return self._forced[: len(tokens)]

    def _choose(self, hidden: Tensor, rows: Sequence[Row], requests: Sequence[Any]) -> Tensor:  # (R,) int64
        states = {self.part.name: hidden} | self._others(rows, hidden)
        logits = [self.head_logits(self.heads[name], part) for name, part in states.items()]
        if logits[0] is None:  # of another tensor parallel rank
            return torch.empty(len(rows), dtype=torch.int64, device=hidden.device)
        gate = torch.stack([self.gate(part, name) for name, part in states.items()], dim=-1).softmax(-1)
        scores, weights = RULES[GATE].mix([own.float() for own in logits], Evidence(gate, gate, hidden))
        finite = scores.isfinite().all(-1).tolist()
        tokens = choose(scores, [self._place(request) for request in requests])
        if get_tp_group().rank_in_group == 0:
            wanted = [request.sampling_params.extra_args["top_logprobs"] for request in requests]
            columns = zip(
                rows, tokens.tolist(), finite, weights.tolist(), likeliest(scores, tokens, wanted), strict=True
            )
            self._choices = [Choice(row[0], *column) for row, *column in columns]
        if isinstance(self._end, Leading):
            self._end.tell(tokens.cpu())
        return tokens

    def _others(self, rows: Sequence[Row], hidden: Tensor) -> dict[str, Tensor]:
        """The other specialists' states, in the order of ``rows``, on every tensor parallel rank."""
        names = list(self.part.widths)[1:]
        if isinstance(self._end, Leading):
            states = {name: part.to(hidden.device) for name, part in self._end.gather(rows).items()}
        else:
            states = {name: hidden.new_empty(len(rows), self.part.widths[name]) for name in names}
        return {name: get_tp_group().broadcast(states[name]) for name in names}

    def _place(self, request: Any) -> Place:
        given = request.sampling_params.extra_args
        bias = {int(token): value for token, value in given["sampling"]["logit_bias"].items()}
        allowed = self._masks.get(given["number"])
        return Place(
            Sampling(**given["sampling"] | {"logit_bias": bias}),
            given["row"],
            len(request.output_token_ids),
            request.prompt_token_ids,
            request.output_token_ids,
            None if allowed is None else partial(_forbid, allowed),
        )


def _forbid(allowed: bytes, scores: Tensor) -> None:
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8), count=len(scores))
    scores[torch.from_numpy(bits == 0).to(scores.device)] = float("-inf")


class UltraFuserLlama(FusedSpecialist, LlamaForCausalLM):
    """A Llama."""


class UltraFuserMistral(FusedSpecialist, MistralForCausalLM):
    """A Mistral."""


class UltraFuserQwen2(FusedSpecialist, Qwen2ForCausalLM):
    """A Qwen2 or Qwen2.5."""


class UltraFuserQwen3(FusedSpecialist, Qwen3ForCausalLM):
    """A Qwen3."""
