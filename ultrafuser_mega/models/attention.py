"""Causal attention within each of the sequences that are packed into one row, rotary embedding included.

Megatron hands ``packed_seq_params`` through to a layer's attention unread. So :class:`SequenceInfo` travels that way
with all that attention needs, made once per microbatch: where sequences begin, and the rotation of every position.
Megatron itself gets no rotary embedding; its own for packed sequences waits for the device in every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ultrafuser_mega.data.packing import PackedTokens
from ultrafuser_mega.models.elementwise import rotated_heads
from ultrafuser_mega.models.families import LinearScaling, Llama3Scaling

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class SequenceInfo(PackedSeqParams):
    """The sequences of a row of T tokens.

    lengths   the k lengths
    starts    (k + 1,) int32
    cos, sin  (T, 1, 1, e / 2) in the dtype of the hidden states
    dropout   seed of what adapters leave out of this row; None: nothing
    """

    lengths: tuple[int, ...] = ()
    starts: Tensor = field(default_factory=lambda: torch.empty(0))
    cos: Tensor = field(default_factory=lambda: torch.empty(0))
    sin: Tensor = field(default_factory=lambda: torch.empty(0))
    dropout: int | None = None

    @classmethod
    def of(
        cls, tokens: PackedTokens, frequencies: Tensor, dtype: torch.dtype, dropout: int | None = None
    ) -> SequenceInfo:
        """Of ``tokens``, rotated by ``frequencies`` (e / 2,) in radians per position."""
        angles = (tokens.positions[:, None].float() * frequencies)[:, None, None]
        return cls(
            qkv_format="sbhd",
            lengths=tokens.lengths,
            starts=tokens.starts.to(torch.int32),
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
            dropout=dropout,
        )


def rotary_frequencies(
    head_dim: int, theta: float, scaling: LinearScaling | Llama3Scaling | None
) -> Tensor:  # (head_dim / 2,) float32
    """Radians per position of each pair of a head's dimensions; with Llama 3's scaling slow ones turn slower yet."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return inv_freq
    if isinstance(scaling, LinearScaling):
        return inv_freq / scaling.factor
    turns = scaling.original_max_positions * inv_freq / (2 * math.pi)  # in the original context
    share = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - share) * inv_freq / scaling.factor + share * inv_freq


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention, its linear maps and their places in a checkpoint, with this project's between them."""

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, *, packed_seq_params: SequenceInfo, **unused: object
    ) -> tuple[Tensor, None]:
        """(T, d), or (T / tp, d) under sequence parallelism, to the same, and no bias."""
        info, groups = packed_seq_params, self.num_query_groups_per_partition
        mixed, _ = self.linear_qkv(hidden_states)
        if self.q_layernorm is not None:
            mixed = self._normed(mixed.unflatten(1, (groups, -1, self.hidden_size_per_attention_head)))
        q, k, v = rotated_heads(mixed, info.cos, info.sin, groups)
        out: tuple[Tensor, None] = self.linear_proj(attend(q, k, v, info))
        return out

    def _normed(self, mixed: Tensor) -> Tensor:
        """(T, groups, heads of a group, e) to (T, all heads * e), queries and keys normed head by head."""
        q, k, v = mixed.split([mixed.shape[2] - 2, 1, 1], dim=2)
        return torch.cat([self.q_layernorm(q), self.k_layernorm(k), v], dim=2).flatten(1)


def attend(q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo) -> Tensor:
    """Grouped-query attention, causal within each sequence; no score of two sequences is ever computed.

    On CUDA flash attention over all sequences at once. Where that does not exist (CPU, float32) sequence by sequence.

    Args:
        q: (T, heads, e), rotated.
        k: (T, groups, e), rotated.
        v: (T, groups, e).
        info: the sequences.

    Returns:
        (T, heads * e).
    """
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda and q.dtype in _FLASH_DTYPES:
        starts, longest, causal = info.starts, max(info.lengths), (-1, 0)
        out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=causal, enable_gqa=grouped)
        assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
        return out.flatten(1)
    attended = []
    for sequence in zip(*(x.split(info.lengths) for x in (q, k, v)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in sequence)
        one = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        attended.append(one[0].transpose(0, 1).flatten(1))
    return torch.cat(attended)
