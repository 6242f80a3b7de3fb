"""The part of the fused model that one rank holds: the stages of its specialist(s), and the fusion head if last.

One class serves both layouts. Disjoint, a rank holds one specialist's stage; colocated, it holds a stage of
each, which run one after the other and share the single tensor that Megatron's pipeline carries between
ranks: their hidden states flattened end to end.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from ultrafuser_mega.config import GATE, HEADS, Lora
from ultrafuser_mega.config.stages import Mode
from ultrafuser_mega.data.packing import PackedTokens
from ultrafuser_mega.models.fusion_head import FusionHead, LossOptions
from ultrafuser_mega.models.hf_folder import Architecture, HFWeights
from ultrafuser_mega.models.specialist import SpecialistStage, transformer_config
from ultrafuser_mega.models.weight_gradients import accumulated_weight_gradients
from ultrafuser_mega.runtime.exchange import HiddenExchange
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.phases import Phases


class FusedStage(MegatronModule):
    """This rank's share of the fused model.

    Args:
        stages: name -> this rank's stage of that specialist.
        fusion: heads and gate; None before the last stage.
        exchange: of hidden states over the fusion group; None before the last stage.
        phases: of this rank; each specialist's forward is one.

    Attributes:
        trained: of this rank's specialists those that have a backward; at first all.
    """

    def __init__(
        self,
        stages: Mapping[str, SpecialistStage],
        fusion: FusionHead | None,
        exchange: HiddenExchange | None,
        phases: Phases,
    ) -> None:
        # Megatron's schedules read pipeline settings, which all local specialists share, from one config.
        super().__init__(config=next(iter(stages.values())).config)
        # finalize_model_grads reads from it whether to look for query and key norms; any specialist may have them.
        self.config.qk_layernorm = any(stage.config.qk_layernorm for stage in stages.values())
        self.model_type = ModelType.encoder_or_decoder
        self.specialists = nn.ModuleDict(stages)
        self.fusion = fusion
        self.exchange = exchange
        self.phases = phases
        self.trained = frozenset(stages)
        self._dropout: Iterator[int] | None = None
        self._received: Tensor | None = None

    @property
    def stages(self) -> dict[str, SpecialistStage]:
        """Name -> this rank's stage of that specialist."""
        return cast(dict[str, SpecialistStage], dict(self.specialists.items()))

    @property
    def has_backward(self) -> bool:
        """Whether a step runs backward through one of this rank's stages."""
        return bool(self.trained)

    @contextlib.contextmanager
    def dropping(self, seed: str) -> Iterator[None]:
        """Around the forwards of a step, whose adapters leave out some inputs, of every microbatch others."""
        self._dropout = (zlib.crc32(f"{seed}/{microbatch}".encode()) for microbatch in itertools.count())
        try:
            yield
        finally:
            self._dropout = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called by Megatron's schedules with what the previous stage sent, or [None] on a first stage."""
        self._received = input_tensor[0]

    def forward(self, tokens: Mapping[str, PackedTokens], rows: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """One stage.

        Args:
            tokens: name -> T_j packed tokens for this rank's specialists; beyond the first stage their ids are unused.
            rows: name -> (N,) which of the T_j hidden states predict the response tokens.

        Returns:
            On a last stage, name -> (N, d_j): this rank's specialists' hidden states at ``rows``.
            Before it, what the next stage needs: (total, 1, 1).
        """
        if self._received is not None:
            self._hand_over(self._received, tokens)
        dropout = next(self._dropout) if self._dropout is not None else None
        hidden = {}
        for name, stage in self.stages.items():
            grad = torch.is_grad_enabled() and name in self.trained
            with self.phases(f"forward of {name}"), torch.set_grad_enabled(grad):
                hidden[name] = stage(tokens[name], dropout)
        if self.fusion is not None:
            return {name: h.index_select(0, rows[name]) for name, h in hidden.items()}
        return torch.cat([h.reshape(-1) for h in hidden.values()]).view(-1, 1, 1)

    def handed_over(self, tokens: Mapping[str, PackedTokens]) -> int:
        """Numbers that a stage hands to the next for a microbatch of these tokens."""
        return sum(self._rows(name, tokens) * stage.arch.hidden_size for name, stage in self.stages.items())

    def _rows(self, name: str, tokens: Mapping[str, PackedTokens]) -> int:
        """Hidden states of a specialist between stages: under sequence parallelism each rank has its part."""
        stage = self.stages[name]
        parts = stage.pg_collection.tp.size() if stage.config.sequence_parallel else 1
        return sum(tokens[name].lengths) // parts

    def _hand_over(self, packed: Tensor, tokens: Mapping[str, PackedTokens]) -> None:
        sizes = [self._rows(name, tokens) * stage.arch.hidden_size for name, stage in self.stages.items()]
        for (name, stage), part in zip(self.stages.items(), packed.view(-1).split(sizes), strict=True):
            stage.set_input_tensor(part.view(self._rows(name, tokens), -1))


def build_fused_stage(
    groups: RankGroups,
    architectures: Mapping[str, Architecture],
    *,
    vocab_size: int,
    gate_units: int,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool,
    loss: LossOptions,
    seed: int,
    recompute_layers: int | Literal["all"] = 0,
    adapters: Mapping[str, Lora] | None = None,
    student: str | None = None,
    phases: Phases | None = None,
) -> FusedStage:
    """This rank's share of the fused model, on ``device``; its weights are not loaded yet.

    ``adapters``: of the specialists that have some; ``student``: of them, one that the others fused are to teach.
    """
    phases = phases or Phases()
    stages = {}
    for name in groups.local_specialists:
        placement = groups.plan.placements[name]
        config = transformer_config(
            architectures[name],
            tp=placement.tp,
            pp=placement.pp,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
            recompute_layers=recompute_layers,
            device=device,
        )
        with torch.device(device), accumulated_weight_gradients(device):
            stages[name] = SpecialistStage(architectures[name], config, groups.megatron)
            if adapters and name in adapters:
                stages[name].adapt(adapters[name], name, seed)
    fusion = exchange = None
    if groups.fusion is not None:
        fusion = FusionHead(architectures, vocab_size, gate_units, groups.fusion, dtype, device, seed, loss, student)
        start = groups.replica_index * groups.plan.replica_size
        owners = {name: [start + rank for rank in p.last_stage] for name, p in groups.plan.placements.items()}
        widths = {name: arch.hidden_size for name, arch in architectures.items()}
        exchange = HiddenExchange(groups.fusion, groups.megatron.tp, owners, widths, phases)
    return FusedStage(stages, fusion, exchange, phases)


def train_parts(model: FusedStage, modes: Mapping[str, Mode]) -> None:
    """Let these parts of this rank's share require gradients and have a backward, and no others; see ``config.parts``.

    Args:
        model: this rank's share.
        modes: of gate, heads and every specialist, the same on every rank.
    """
    model.requires_grad_(False)
    if model.fusion is not None:
        model.fusion.gate.requires_grad_(modes[GATE] == "full")
        for name, head in model.fusion.heads.items():
            head.requires_grad_(modes[HEADS] == "full" and model.fusion.student in (None, name))
    for name, stage in model.stages.items():
        stage.requires_grad_(modes[name] == "full")
        if stage.adapters is not None:
            stage.adapters.requires_grad_(modes[name] == "lora")
    trained = frozenset(name for name, mode in modes.items() if name not in (GATE, HEADS) and mode != "frozen")
    model.trained = trained & model.stages.keys()
    if model.exchange is not None:
        model.exchange.trained = trained


def load_hf_weights(
    model: FusedStage, folders: Mapping[str, Path], groups: RankGroups, dtype: torch.dtype | None = None
) -> None:
    """Fill this rank's share from the specialists' Hugging Face folders, in the model's element type.

    With ``dtype`` they are rounded to it, where it is the narrower one: as a run of that type had them. A specialist
    without a folder stays as it is. The first replica reads; the others receive from the rank at their place there.
    Collective over the job.

    Raises:
        InputError: a folder cannot be read, or holds a value that is beyond the element type; on ranks that read.
    """
    fusion, own, weights = model.fusion, model.config.params_dtype, {}
    read_as = own if dtype is None or dtype.itemsize >= own.itemsize else dtype
    if groups.reads:
        archs = {name: stage.arch for name, stage in model.stages.items()}
        archs |= fusion.architectures if fusion is not None else {}
        weights = {name: HFWeights(folders[name], arch, read_as) for name, arch in archs.items() if name in folders}
    # Specialist by specialist: who waits for the first replica does so in a collective, which has a time limit.
    for name, stage in model.stages.items():
        if name not in folders:
            continue
        if groups.reads:
            stage.load_hf(weights[name])
        groups.receive(stage.parameters())
    if fusion is not None:
        if groups.reads:
            fusion.load_hf(weights)
        groups.receive([*fusion.heads.values(), *fusion.tails.values()])


def load_weights(model: FusedStage, weights: Mapping[str, HFWeights]) -> None:
    """Fill this rank's share but for the gate from the specialists' tensors, wherever they lie."""
    for name, stage in model.stages.items():
        stage.load_hf(weights[name])
    if model.fusion is not None:
        model.fusion.load_hf(weights)
