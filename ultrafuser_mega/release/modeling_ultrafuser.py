"""The fused model: n specialists, a gate over their hidden states, one mixture of their logits (paper, equation 1).

    a_j = w2 . relu(W1 h_j + b1)      w = softmax(a_1 .. a_n)      z = sum_j w_j o_j[:vocab_size]

h_j is specialist j's last hidden state (after its final norm) and o_j its logits. All specialists may read the same
ids, as generic tools do it, or each its own prompt (its chat template) followed by the shared response; see
``UltraFuserForCausalLM.forward``. This file travels with the model; it imports nothing but torch and transformers.

Shapes: b batch, n specialists, s_j tokens given to specialist j, t positions with logits, d_j hidden size, m units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from .chat_ultrafuser import ChatMixin
from .configuration_ultrafuser import UltraFuserConfig


@dataclass
class UltraFuserOutput(CausalLMOutputWithPast):
    """What transformers' causal models return, and ``gate_weights`` (b, t, n) float32 where they were asked for."""

    gate_weights: Tensor | None = None


class FusedCache(Cache):
    """One cache per specialist: their prompts differ in length, their layers in number and shape.

    To transformers it is one cache that holds all their layers, so beams are reordered and batches selected as in any
    other; its length is that of the first specialist.
    """

    def __init__(self, caches: Mapping[str, Cache]) -> None:
        super().__init__(layers=[layer for cache in caches.values() for layer in cache.layers])
        self.caches = dict(caches)


class FirstLayers(nn.Module):
    """The gate's W1, shared or one per specialist. A module that is called, so that accelerate can offload it."""

    def __init__(self, widths: Mapping[str, int], units: int) -> None:
        super().__init__()
        for name, width in widths.items():
            self.register_parameter(name, nn.Parameter(torch.empty(units, width)))

    def forward(self, hidden: Tensor, name: str, bias: Tensor) -> Tensor:  # (b, t, d_j), (m,) -> (b, t, m)
        """W1 h + b1 with the W1 called ``name``."""
        weight = self.get_parameter(name)
        return nn.functional.linear(hidden.to(weight.dtype), weight, bias)


class Gate(nn.Module):
    """Two-layer ReLU perceptron that gives each specialist's hidden state one scalar (paper, equation 1)."""

    def __init__(self, widths: Mapping[str, int], units: int, shared: bool) -> None:
        super().__init__()
        if shared and len(set(widths.values())) > 1:
            raise ValueError(f"gate_shared: hidden sizes {list(widths.values())} differ; each needs a first layer")
        self.shared = shared
        self.w1 = FirstLayers({"shared": next(iter(widths.values()))} if shared else widths, units)
        self.b1 = nn.Parameter(torch.empty(units))
        self.w2 = nn.Parameter(torch.empty(units))

    def forward(self, hidden: Tensor, name: str) -> Tensor:  # (b, t, d_j) -> (b, t) float32
        """a_j of specialist ``name``."""
        active = torch.relu(self.w1(hidden, "shared" if self.shared else name, self.b1))
        return active.float() @ self.w2.float()

    def initialize(self) -> None:
        """Like torch.nn.Linear; parameters that a checkpoint brought are left alone."""
        fan_in = [(w1, w1.shape[1]) for w1 in self.w1.parameters()]
        fan_in += [(self.b1, max(width for _, width in fan_in)), (self.w2, self.w2.shape[0])]
        for parameter, width in fan_in:
            init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width))


class UltraFuserForCausalLM(ChatMixin, PreTrainedModel, GenerationMixin):
    """n specialists fused token by token. Loads with ``AutoModelForCausalLM`` and ``trust_remote_code=True``."""

    config_class = UltraFuserConfig
    config: UltraFuserConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Assisted decoding extends and rolls back one prompt; here there are n.
    _supported_generation_modes = ["greedy_search", "sample", "beam_search", "beam_sample"]  # noqa: RUF012

    def __init__(self, config: UltraFuserConfig) -> None:
        super().__init__(config)
        self.names = config.names
        configs = {name: config.specialist_config(name) for name in self.names}
        self.specialists = nn.ModuleDict(
            {
                name: AutoModelForCausalLM.from_config(
                    configs[name], attn_implementation=config._attn_implementation, dtype=torch.get_default_dtype()
                )
                for name in self.names
            }
        )
        widths = {name: configs[name].hidden_size for name in self.names}
        self.gate = Gate(widths, config.gate_units, config.gate_shared)
        self._no_split_modules = {"Gate"}.union(*(self._specialist(name)._no_split_modules for name in self.names))
        self.post_init()
        # post_init looks at children only, and the specialists are grandchildren.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def _specialist(self, name: str) -> Any:
        return self.specialists[name]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Gate):
            module.initialize()

    def get_input_embeddings(self) -> nn.Module:
        """Refused: every specialist has its own (``model.specialists[name].get_input_embeddings()``)."""
        raise NotImplementedError("a fused model has one embedding per specialist; use model.specialists[name]")

    def forward(
        self,
        input_ids: Tensor | None = None,  # (b, s)
        attention_mask: Tensor | None = None,  # (b, past + s)
        past_key_values: FusedCache | None = None,
        labels: Tensor | None = None,  # (b, t)
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        specialist_input_ids: Mapping[str, Tensor] | None = None,  # name -> (b, s_j)
        specialist_attention_mask: Mapping[str, Tensor | None] | None = None,  # name -> (b, past_j + s_j)
        return_gate_weights: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> UltraFuserOutput | tuple[Any, ...]:
        """Fused logits, and what was asked for beside them.

        Args:
            input_ids: read by every specialist alike; or else
            specialist_input_ids: each specialist's own ids. Their ends are aligned: position -k of every specialist
                predicts the same token, so pad on the left.
            attention_mask, specialist_attention_mask: 1 for tokens, 0 for padding, including what the cache holds.
            past_key_values: the cache of an earlier call.
            labels: of the t positions with logits, -100 where there is no loss; shifted inside, as everywhere in
                transformers.
            use_cache: whether to return a cache; default: the configuration's.
            logits_to_keep: t, the number of last positions that get logits; 0: all that every specialist has, which
                is s for shared ids and the shortest s_j otherwise.
            return_gate_weights: also return w.
            return_dict: False returns a tuple.
            num_items_in_batch: divisor of the loss in place of the number of labels (transformers' Trainer).

        Returns:
            ``logits`` (b, t, vocab_size) float32, ``loss``, ``past_key_values``, ``gate_weights`` (b, t, n) float32.

        Raises:
            ValueError: arguments that contradict each other, or that a fused model cannot honour.
        """
        if unknown := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise ValueError(f"{', '.join(unknown)}: not supported by a fused model")
        ids, masks = self._read(input_ids, attention_mask, specialist_input_ids, specialist_attention_mask)
        if past_key_values is not None and not isinstance(past_key_values, FusedCache):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values: a fused model needs the cache that it returned itself, found {kind}")
        if isinstance(logits_to_keep, Tensor):
            raise ValueError("logits_to_keep: a fused model takes how many last positions, not which positions")
        if input_ids is not None and (past_key_values is None or not past_key_values.get_seq_length()):
            self._tell_of_templates(input_ids, attention_mask)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = self._new_cache()
        keep = logits_to_keep or min(part.shape[1] for part in ids.values())

        hidden = {}
        for name in self.names:
            cache = None if past_key_values is None else past_key_values.caches[name]
            hidden[name] = self.last_hidden(name, ids[name], masks[name], cache)[:, -keep:]
            if hidden[name].shape[1] < keep:
                raise ValueError(f"logits_to_keep: {keep} is more than the {hidden[name].shape[1]} tokens of {name}")
        weights = self.gate_weights(hidden)
        logits = self.mixture((self.own_logits(name, hidden[name]) for name in self.names), weights)

        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        output = UltraFuserOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            gate_weights=weights if return_gate_weights else None,
        )
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output

    # Equation 1 in its parts, for programs that decode by themselves.

    def last_hidden(
        self, name: str, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:  # (b, s_j, d_j)
        """Hidden states of one specialist for the tokens behind those that ``cache`` holds; it takes them in.

        Args:
            name: the specialist.
            ids: (b, s_j).
            mask: (b, past_j + s_j), 1 for tokens and 0 for padding; None: no padding.
            cache: the specialist's own, as in ``FusedCache.caches``.
        """
        positions = None
        if mask is not None:
            past = 0 if cache is None else cache.get_seq_length()
            if tuple(mask.shape) != (ids.shape[0], past + ids.shape[1]):
                wanted = f"({ids.shape[0]}, {past} cached + {ids.shape[1]} given)"
                raise ValueError(f"attention mask of {name}: shape is {tuple(mask.shape)}, expected {wanted}")
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        outputs = self._specialist(name).base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def own_logits(self, name: str, hidden: Tensor) -> Tensor:  # (b, t, d_j) -> (b, t, vocab_size) float32
        """o_j: the logits of one specialist alone, cropped to the shared vocabulary."""
        return self._specialist(name).get_output_embeddings()(hidden)[..., : self.config.vocab_size].float()

    def gate_weights(self, hidden: Mapping[str, Tensor]) -> Tensor:  # name -> (b, t, d_j); (b, t, n) float32
        """w: how much each specialist counts at every position."""
        device = hidden[self.names[0]].device  # accelerate may have put specialists and gate on several
        scores = [self.gate(hidden[name], name).to(device) for name in self.names]
        return torch.stack(scores, dim=-1).softmax(dim=-1)

    def mixture(self, logits: Iterable[Tensor], weights: Tensor) -> Tensor:  # (b, t, vocab_size) float32
        """z from the specialists' logits, asked for one after the other, in the order of ``weights`` (b, t, n)."""
        mixed: Tensor | None = None
        for own, weight in zip(logits, weights.split(1, dim=-1), strict=True):
            if mixed is None:
                mixed = own.to(weight.device) * weight
            else:
                mixed = mixed.addcmul_(own.to(weight.device), weight)
        assert mixed is not None
        return mixed

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        own_ids: Mapping[str, Tensor] | None,
        own_masks: Mapping[str, Tensor | None] | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """What each specialist reads, of the two ways to say it."""
        if own_ids is None:
            if input_ids is None:
                raise ValueError("input_ids: missing; give them or specialist_input_ids")
            return dict.fromkeys(self.names, input_ids), dict.fromkeys(self.names, attention_mask)
        if input_ids is not None or attention_mask is not None:
            raise ValueError("input_ids, attention_mask: give them or specialist_input_ids and _mask, not both")
        return self._per_specialist(own_ids, own_masks)

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if labels.shape != logits.shape[:2]:
            shapes = f"{tuple(labels.shape)}, logits have {tuple(logits.shape[:2])}"
            raise ValueError(f"labels: shape is {shapes}; give one label per position with logits")
        return self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)

    def _per_specialist(
        self, ids: Mapping[str, Tensor], masks: Mapping[str, Tensor | None] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        for what, given in (("specialist_input_ids", ids), ("specialist_attention_mask", masks)):
            if given is not None and set(given) != set(self.names):
                found, wanted = ", ".join(given) or "none", ", ".join(self.names)
                raise ValueError(f"{what}: given for {found}; expected exactly {wanted}")
        batches = {name: part.shape[0] for name, part in ids.items()}
        if len(set(batches.values())) > 1:
            raise ValueError(f"specialist_input_ids: batch sizes differ: {batches}")
        return {name: ids[name] for name in self.names}, {name: masks[name] if masks else None for name in self.names}

    def _new_cache(self) -> FusedCache:
        return FusedCache({name: DynamicCache(config=self._specialist(name).config) for name in self.names})

    # Generation. transformers keeps one sequence, ``input_ids``: the first specialist's prompt and the response. The
    # other prompts stay as they were given, and the response is put behind each of them at every step.

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        specialist_input_ids: Mapping[str, Tensor] | None = None,
        specialist_attention_mask: Mapping[str, Tensor | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``; prompts are ``inputs`` for all specialists or one each, padded on the left.

        Args:
            inputs: (b, s), also as ``input_ids=``; beside ``specialist_input_ids`` the first specialist's, which tools
                pass on by themselves.
            specialist_input_ids, specialist_attention_mask: name -> (b, s_j), as from ``chat_inputs``.

        Returns:
            As in transformers. With specialist prompts a sequence is the first specialist's prompt and the response,
            and ``max_length`` counts that prompt.

        Raises:
            ValueError: assisted decoding, static or quantised caches, ``return_gate_weights`` (ask ``forward`` for
                them once the response is known), or prompts that contradict each other.
        """
        if kwargs.get("return_gate_weights"):
            raise ValueError("return_gate_weights: generate() keeps none; call forward() on the finished sequence")
        if specialist_input_ids is not None:
            ids, masks = self._per_specialist(specialist_input_ids, specialist_attention_mask)
            first = self.names[0]
            for given, own in (
                (inputs, ids[first]),
                (kwargs.pop("input_ids", None), ids[first]),
                (kwargs.pop("attention_mask", None), masks[first]),
            ):
                if given is not None and (own is None or not torch.equal(given, own)):
                    raise ValueError("input_ids, attention_mask: give them or specialist_input_ids and _mask, not both")
            for name, mask in masks.items():
                if mask is not None and not bool((mask[:, -1] == 1).all()):
                    raise ValueError(f"specialist_attention_mask: {name} is padded on the right; pad on the left")
                masks[name] = None if mask is None or bool((mask == 1).all()) else mask
            inputs, first_mask = ids[self.names[0]], masks[self.names[0]]
            kwargs |= {"specialist_input_ids": ids, "specialist_attention_mask": masks}
            kwargs["attention_mask"] = torch.ones_like(inputs) if first_mask is None else first_mask
        parent: Any = super()
        return parent.generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,  # (b, first prompt + response)
        specialist_input_ids: Mapping[str, Tensor] | None = None,
        specialist_attention_mask: Mapping[str, Tensor | None] | None = None,
        past_key_values: FusedCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``forward`` gets at one step: of every specialist the tokens that its cache lacks."""
        if specialist_input_ids is None or specialist_attention_mask is None:
            parent: Any = super()
            return parent.prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        prompt_length = specialist_input_ids[self.names[0]].shape[1]
        if input_ids.shape[1] < prompt_length:
            raise ValueError("prefill_chunk_size: not supported with specialist_input_ids")
        response = input_ids[:, prompt_length:]
        ids, masks = {}, {}
        for name in self.names:
            past = 0 if past_key_values is None else past_key_values.caches[name].get_seq_length()
            ids[name] = torch.cat([specialist_input_ids[name], response], dim=1)[:, past:]
            if ids[name].shape[1] == 0:
                raise ValueError(f"past_key_values: holds all {past} tokens of {name}'s prompt; give a longer prompt")
            mask = specialist_attention_mask[name]
            masks[name] = None if mask is None else torch.cat([mask, torch.ones_like(response)], dim=1)
        return {
            "specialist_input_ids": ids,
            "specialist_attention_mask": masks,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    def _expand_inputs_for_generation(self, expand_size: int = 1, **model_kwargs: Any) -> Any:  # type: ignore[override]
        for field in ("specialist_input_ids", "specialist_attention_mask"):
            if expand_size > 1 and field in model_kwargs:
                model_kwargs[field] = {
                    name: None if part is None else part.repeat_interleave(expand_size, dim=0)
                    for name, part in model_kwargs[field].items()
                }
        parent: Any = super()
        return parent._expand_inputs_for_generation(expand_size, **model_kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            kind = generation_config.cache_implementation
            raise ValueError(f"cache_implementation: {kind!r} is not supported by a fused model; use 'dynamic'")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._new_cache()
            return None
        parent: Any = super()
        return parent._prepare_cache_for_generation(generation_config, model_kwargs, *args)
