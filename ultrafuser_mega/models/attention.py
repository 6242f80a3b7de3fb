"""Causal attention within each of the sequences that are packed into one row, rotary embedding included.

Megatron hands ``packed_seq_params`` through to the attention core unread as long as its format is not "thd", whose
rotary path waits for the device in every layer. So :class:`SequenceInfo` travels that way with all that the core
needs, made once per microbatch: where sequences begin, and the rotation of every position. Megatron itself gets no
rotary embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from ultrafuser_mega.data.packing import PackedTokens
from ultrafuser_mega.models.elementwise import rotate
from ultrafuser_mega.models.families import LinearScaling, Llama3Scaling

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class SequenceInfo(PackedSeqParams):
    """The sequences of a row of T tokens.

    lengths   the k lengths
    starts    (k + 1,) int32
    cos, sin  (T, 1, 1, e / 2) in the dtype of the hidden states
    """

    lengths: tuple[int, ...] = ()
    starts: Tensor = field(default_factory=lambda: torch.empty(0))
    cos: Tensor = field(default_factory=lambda: torch.empty(0))
    sin: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, tokens: PackedTokens, frequencies: Tensor, dtype: torch.dtype) -> SequenceInfo:
        """Of ``tokens``, rotated by ``frequencies`` (e / 2,) in radians per position."""
        angles = (tokens.positions[:, None].float() * frequencies)[:, None, None]
        return cls(
            qkv_format="sbhd",
            lengths=tokens.lengths,
            starts=tokens.starts.to(torch.int32),
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
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


class PackedAttention(nn.Module):
    """Grouped-query attention, causal within each sequence; no score of two sequences is ever computed.

    On CUDA flash attention over all sequences at once. Where that does not exist (CPU, float32) sequence by sequence.
    """

    def __init__(self, config: TransformerConfig, *args: object, **unused: object) -> None:
        super().__init__()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: None, *, packed_seq_params: SequenceInfo, **unused: object
    ) -> Tensor:
        """q (T, 1, heads, e), k and v (T, 1, groups, e) -> (T, 1, heads * e)."""
        info = packed_seq_params
        q, k = rotate(q, k, info.cos, info.sin)
        v = v.squeeze(1)
        grouped = q.shape[1] != k.shape[1]
        if q.is_cuda and q.dtype in _FLASH_DTYPES:
            starts, longest, causal = info.starts, max(info.lengths), (-1, 0)
            out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=causal, enable_gqa=grouped)
            assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
            return out.view(len(out), 1, -1)
        sequences = zip(*(x.transpose(0, 1)[None].split(info.lengths, dim=2) for x in (q, k, v)), strict=True)
        attended = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in sequences
        ]
        return torch.cat(attended, dim=2).permute(2, 0, 1, 3).flatten(2)
