"""One specialist's pipeline stage: a Megatron-core GPTModel without an output layer, filled from an HF folder.

The output heads live elsewhere (``fusion_head``): their vocabulary rows are spread over the ranks of all
specialists. What leaves a last stage is the hidden state after the final norm.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ultrafuser_mega.config import Lora
from ultrafuser_mega.data.packing import PackedTokens
from ultrafuser_mega.models.attention import SequenceInfo, rotary_frequencies
from ultrafuser_mega.models.families import FAMILIES
from ultrafuser_mega.models.hf_folder import Architecture, HFWeights
from ultrafuser_mega.models.layers import RMSNorm, layer_spec
from ultrafuser_mega.models.lora import Adapters
from ultrafuser_mega.models.pipeline import stage_layers
from ultrafuser_mega.models.shared_heads import head_by_head
from ultrafuser_mega.runtime.shared_rows import SharedRows, mark_shared, shared_rows


def transformer_config(
    arch: Architecture,
    *,
    tp: int,
    pp: int,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute_layers: int | Literal["all"],
    device: torch.device,
) -> TransformerConfig:
    """Megatron's configuration of a specialist."""
    family = FAMILIES[arch.family]
    stages = stage_layers(arch.layers, pp)
    recomputed = arch.layers if recompute_layers == "all" else min(recompute_layers, arch.layers)
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.heads,
        num_query_groups=max(arch.kv_heads, tp),  # every rank has a group, if need be of a shared key/value head
        kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        use_te_activation_func=True,  # the one that the layer spec names
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,  # also has finalize_model_grads sum these norms' gradients over the heads' ranks
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_in_first_pipeline_stage=stages[0] if len(set(stages)) > 1 else None,
        num_layers_in_last_pipeline_stage=stages[-1] if len(set(stages)) > 1 else None,
        sequence_parallel=sequence_parallel and tp > 1,
        recompute_granularity="full" if recomputed else None,
        recompute_method="block" if recomputed else None,
        recompute_num_layers=recomputed or None,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,  # every weight is read from a file
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths asks for, experts or not
        calculate_per_token_loss=True,  # the loss comes scaled by the global batch: nothing is divided on the way
        batch_p2p_comm=False,  # batched p2p with variable lengths deadlocks from 4 stages on (Megatron-LM #5100)
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=True,  # see weight_gradients.py
        apply_rope_fusion=False,
    )


class SpecialistStage(GPTModel):
    """The layers of one specialist that live on this pipeline stage.

    Args:
        arch: sizes from the specialist's config.json.
        config: from :func:`transformer_config`.
        groups: process groups of this specialist on this rank.

    Attributes:
        adapters: beside the layers' linear maps; None: it has none.
    """

    frequencies: Tensor
    adapters: Adapters | None

    def __init__(self, arch: Architecture, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        tp = groups.tp.size()
        super().__init__(
            config,
            layer_spec(qk_norm=config.qk_layernorm),
            vocab_size=-(-arch.vocab_rows // tp) * tp,
            max_sequence_length=arch.max_positions,
            pre_process=groups.pp.rank() == 0,
            post_process=False,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",  # the attention core's work
            pg_collection=groups,
        )
        self.arch = arch
        with torch.device("cpu"):  # the same numbers on every device
            frequencies = rotary_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling)
        self.register_buffer("frequencies", frequencies.to(next(self.parameters()).device), persistent=False)
        self.is_last = groups.pp.rank() == groups.pp.size() - 1
        if self.is_last:
            # GPTModel ties the final norm to the output layer, which this model does not have.
            self.decoder.final_layernorm = RMSNorm(config, arch.hidden_size, eps=arch.norm_eps)

        # Megatron marks shards while it initialises them, which is skipped here; without the mark its gradient norm
        # would take a shard for a copy and count one rank's only.
        for module in self.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
                dim = 1 if isinstance(module, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
        if (copies := arch.kv_copies(tp)) > 1:
            for layer in self.decoder.layers:
                for parameter in layer.self_attention.linear_qkv.parameters():
                    mark_shared(parameter, SharedRows(arch.heads // tp * arch.head_dim, copies))
        self.adapters = None

    def adapt(self, lora: Lora, name: str, seed: int) -> None:
        """Give every layer adapters, which change nothing yet.

        Args:
            lora: which, and of what rank.
            name: of the specialist.
            seed: of the run, from which and the name their first numbers come.
        """
        weight = next(self.decoder.layers.parameters())
        self.adapters = Adapters(
            list(self.decoder.layers),
            self.arch,
            lora,
            self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            dtype=weight.dtype,
            device=weight.device,
            seed=seed,
            name=name,
        )

    def forward(self, tokens: PackedTokens, dropout: int | None = None) -> Tensor:
        """What leaves this stage: (T, d), or (T / tp, d) under sequence parallelism between stages.

        On the last stage after the final norm and over the whole row.

        Args:
            tokens: of a microbatch.
            dropout: seed of what its adapters leave out; None: nothing.
        """
        info = SequenceInfo.of(tokens, self.frequencies, self.config.params_dtype, dropout)
        embedded = self.embedding(tokens.ids, position_ids=None).squeeze(1) if self.pre_process else None
        if embedded is not None and self.config.recompute_granularity and torch.is_grad_enabled():
            # A layer that is computed anew has a backward only if its input has: of a frozen embedding none would.
            embedded.requires_grad_()
        hidden = self.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=info)
        if self.is_last and self.config.sequence_parallel:
            # What follows treats all ranks alike, so the gradient is already complete on each: split, not reduce.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's, with every head in its place of the whole and shared ones once, whatever tp is."""
        state = super().sharded_state_dict(*args, **kwargs)
        if self.adapters is not None:
            prefix, replica = f"{kwargs['prefix']}adapters.", kwargs["metadata"]["dp_cp_group"].rank()
            state = {key: shard for key, shard in state.items() if not key.startswith(prefix)}
            state |= self.adapters.described(prefix, self.arch.layers, replica)
        for key, shard in state.items():
            # Adapters are cut by heads already.
            if isinstance(shard, ShardedTensor) and shared_rows(shard.data) is not None and ".adapters." not in key:
                state[key] = head_by_head(shard, self.arch, self.pg_collection.tp)
        return state

    @torch.no_grad()
    def load_hf(self, weights: HFWeights) -> None:
        """Fill this stage's weights from the slices it needs."""
        rank, tp = self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        if self.pre_process:
            table = self.embedding.word_embeddings.weight
            rows = slice(rank * table.shape[0], min((rank + 1) * table.shape[0], self.arch.vocab_rows))
            table.zero_()  # rows that pad the vocabulary to a multiple of tp
            table[: rows.stop - rows.start] = weights.embedding(rows)
        for layer in self.decoder.layers:
            parameters = dict(layer.named_parameters())
            shard = weights.layer(layer.layer_number - 1, rank, tp)
            if parameters.keys() != shard.keys():
                raise RuntimeError(f"layer parameters {sorted(parameters)} do not match the reader's {sorted(shard)}")
            for key, value in shard.items():
                parameters[key].copy_(value)
        if self.is_last:
            self.decoder.final_layernorm.weight.copy_(weights.final_norm())
