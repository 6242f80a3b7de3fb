"""The model class ``ultrafuser`` of lm-evaluation-harness: a fused model, one of its specialists, or any single one.

Without chat templates all specialists read the same text, as every causal model does there. With
``--apply_chat_template`` a context is a conversation, which each specialist reads in its own template: the harness
hands the conversation through as JSON, so that this class can still see it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from ultrafuser_mega.data.chat_format import SequenceTokenizer
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer, Limits
from ultrafuser_mega.inference.embedded import Serving
from ultrafuser_mega.inference.model import OpenedModel, opened_model
from ultrafuser_mega.inference.requests import Prompt
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.scoring import Continued, Scorer
from ultrafuser_mega.inference.text_engine import Answer

_CHAT = '[{"role":'  # what a conversation begins with when it comes as JSON


@register_model("ultrafuser")
class UltraFuserLM(TemplateLM):
    """``lm_eval --model ultrafuser --model_args pretrained=runs/demo``.

    Args:
        pretrained: see :mod:`ultrafuser_mega.inference.address`.
        device: auto, cpu, cuda:N, or one per specialist.
        dtype: fp32, bf16 or fp16; None: as stored.
        batch_size: prompts that are answered at once.
        max_batch_size: not used; the harness gives it to every model.
        max_length: of a sequence; None: what the specialists read.
        add_bos_token: whether text that is no conversation begins with BOS; None: as the tokenizer has it.
        max_gen_toks: of an answer, where a task does not say.
        opened: the model where it is in memory already; ``pretrained`` is only its name then.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        opened: OpenedModel | None = None,
    ) -> None:
        super().__init__()
        self._stack = ExitStack()  # open as long as the model is
        where = "auto" if device in (None, "cuda") else str(device)
        self._opened = opened or self._stack.enter_context(opened_model(str(pretrained), where, dtype))
        self.tokenizer = self._opened.tokenizer
        self._sequences = SequenceTokenizer(self.tokenizer)
        self._names = self._opened.model.names
        self._answerer = Answerer(self._opened, Serving(32 if batch_size == "auto" else int(batch_size)))
        self._scorer = Scorer(self._opened.model, self._opened.rule)
        self._add_bos, self._max_gen_toks = add_bos_token, max_gen_toks
        positions = [self._opened.model.config.specialist_config(n).max_position_embeddings for n in self._names]
        self.max_length = min(positions) if max_length is None else min(max_length, *positions)
        self._pretrained = str(pretrained)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        entries = [self._opened.model.config.entry(name)["template"] for name in self._names]
        digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
        return f"{self._pretrained.replace('/', '__')}-{digest[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        options: dict[str, Any] = {}
        if add_special_tokens is None:
            if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
                options["add_special_tokens"] = False
            elif self._add_bos is not None:
                options["add_special_tokens"] = self._add_bos
        else:
            options["add_special_tokens"] = add_special_tokens
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise InputError("gen_prefix: an answer that is begun has no place in the specialists' templates")
        return json.dumps(chat_history, ensure_ascii=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            raise InputError(f"--apply_chat_template {chat_template}: every specialist has its own; give no name")
        return "each specialist's own" if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        model = self._opened.model
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "model_dtype": str(model.dtype),
            "model_specialists": self._names,
        }

    def _encode_pair(self, context: str, continuation: str) -> tuple[Any, list[int]]:
        if not context.startswith(_CHAT):
            return super()._encode_pair(context, continuation)
        lead = self._opened.model.config.response_lead
        return context, self._sequences.encode_responses([continuation], lead)[0]

    def _prompt(self, context: Any) -> Prompt:
        if isinstance(context, str):
            return self._answerer.encode(json.loads(context))
        return dict.fromkeys(self._names, context)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Any, list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            if not isinstance(context, str):
                whole = [*context, *continuation][-(self.max_length + 1) :]  # as the harness does: cut on the left
                context = whole[: max(1, len(whole) - len(continuation))]
                continuation = whole[len(context) :]
            asked.append(Continued(self._prompt(context), continuation))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        bar = tqdm(total=len(asked), disable=disable_tqdm, desc="Running loglikelihood requests")
        for number, likelihood in self._scorer.score(asked):
            found[number] = likelihood.total, likelihood.greedy
            bar.update()
        bar.close()
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        owners, windows = [], []
        for number, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                owners.append(number)
                windows.append((None, *utils.make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for numbers in groups.values():
            settings: Any = normalize_gen_kwargs(dict(requests[numbers[0]].args[1]), self._max_gen_toks)
            stop = [settings["until"]] if isinstance(settings.get("until"), str) else list(settings.get("until") or [])
            sampling = Sampling(
                temperature=float(settings.get("temperature", 0.0)),
                top_k=int(settings.get("top_k", 0) or 0),
                top_p=float(settings.get("top_p", 1.0)),
            )
            length = int(settings["max_gen_toks"])
            prompts = {number: self._cut(self._context(requests[number].args[0]), length) for number in numbers}
            order = sorted(numbers, key=lambda number: -max(map(len, prompts[number].values())))
            chat = requests[order[0]].args[0].startswith(_CHAT)
            limits = Limits(length, tuple(term for term in stop if term))
            sorted_prompts = [prompts[number] for number in order]
            events = self._answerer.stream(sorted_prompts, limits, sampling, lead=chat)
            for event in events:
                if isinstance(event, tuple) and isinstance(event[1], Answer):
                    answers[order[event[0]]] = postprocess_generated_text(event[1].text, stop, None)
                    bar.update()
        bar.close()
        return answers

    def _context(self, text: str) -> Prompt:
        return self._prompt(text if text.startswith(_CHAT) else self.tok_encode(text))

    def _cut(self, prompt: Prompt, length: int) -> Prompt:
        """The prompt with room behind it for ``length`` tokens, cut on the left as the harness does."""
        most = self.max_length - length
        if most < 1:
            raise InputError(f"max_gen_toks: {length} leaves no room for a prompt in {self.max_length} tokens")
        return {name: list(ids)[-most:] for name, ids in prompt.items()}
