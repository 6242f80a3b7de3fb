"""Megatron's data parallelism, optimizer and learning-rate schedule around the parameters a stage trains.

The rate of step k = 1 .. S of a stage, with a warm-up of n steps and m = max(n, 1):

    k <= n              lr k / n, so that the first step already moves the weights and step n has lr
    k >= m, cosine      min_lr + (lr - min_lr) (1 + cos(pi (k - m) / (S - m + 1))) / 2
    k >= m, constant    lr

Step m has lr; the cosine would reach min_lr at step S + 1, so that no step is spent on a rate of zero. A part of the
model (gate, heads, a specialist) may have all of it otherwise: its parameters then are groups of their own, with a
schedule of their own.

The optimizer is AdamW. Weight decay takes matrices: those of linear layers, the embeddings, the output heads, and both
layers of the gate (its second, ``w2``, is a 1 x m matrix that is kept as a vector). Biases and norms do not decay.
Before the update gradients are scaled by min(1, clip_grad / (norm + 1e-6)); the norm is the whole model's. Torch's
fused AdamW does the update, on CPUs as on GPUs: one kernel without temporaries. With ``optimizer.state: host`` what it
holds lies in host memory between updates (``runtime.host_states``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ultrafuser_mega.config import GATE, HEADS, Stage, TrainedPart
from ultrafuser_mega.config import Optimizer as OptimizerOptions
from ultrafuser_mega.runtime.host_states import HostStates, Updated
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.shared_rows import sum_shared_gradients
from ultrafuser_mega.runtime.trainable import Schedules, Trainable, owned, updated
from ultrafuser_mega.runtime.weight_gather import WeightGather

#: Names of the parameters that weight decay leaves alone: the biases (``b1`` is the gate's) and the norms.
NOT_DECAYED = ("*.bias", "*.b1", "*layernorm.weight")
#: Key of a parameter group that a part has for itself.
_PART = "part"
#: Parameters whose gradients are summed together where that overlaps with the backward; None: Megatron's number.
BUCKET_PARAMETERS: int | None = None


def make_trainable(
    module: nn.Module,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    stage: Stage,
    options: OptimizerOptions,
    *,
    distributed_optimizer: bool,
    overlap: bool,
    device: torch.device,
    parts: Iterable[TrainedPart] = (),
    phases: Phases | None = None,
) -> Trainable:
    """Wrap ``module`` for training its parameters that require gradients.

    Args:
        module: this rank's module; every rank of ``groups.mp`` must make one.
        config: Megatron's model configuration; its gradient hooks are set here.
        groups: ``dp`` reduces gradients, ``mp`` (``intra_dist_opt``) sums the squared gradient norm.
        stage: steps and learning rate, with a schedule that was checked.
        options: AdamW's.
        distributed_optimizer: shard optimizer state over ``groups.dp``.
        overlap: sum gradients over ``groups.dp`` bucket by bucket, while the last microbatch's backward goes on; every
            parameter must get one then, through Megatron's schedule. With ``distributed_optimizer`` weights are
            gathered under the next forward.
        parts: of the model, those that may have rates or a weight decay of their own.
        phases: of this rank.
    """
    phases = phases or Phases()
    overlap = overlap and groups.dp.size() > 1
    parts, usual = list(parts), _settings(stage, options.weight_decay)
    _fresh_parameters(module)
    with megatron_scope(device):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and distributed_optimizer,
            bucket_size=BUCKET_PARAMETERS,
        )
        wrapped = DistributedDataParallel(config, ddp_config, module, pg_collection=groups)
        config.no_sync_func = wrapped.no_sync
        config.finalize_model_grads_func = partial(_finalize_gradients, phases)
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=stage.lr,
            min_lr=stage.min_lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.eps,
            clip_grad=0.0,  # Trainable clips
            bf16=config.params_dtype == torch.bfloat16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        )
        overrides: dict[ParamKey, Any] = {ParamKey(name=NOT_DECAYED): {"wd_mult": 0.0}}
        own = [part for part in parts if part.trains and _settings(part.rates, part.weight_decay) != usual]
        for part in own:
            overrides[ParamKey(name=names_of(part.name))] = {_PART: part.name}
        optimizer = get_megatron_optimizer(
            optimizer_config,
            [wrapped],
            config_overrides=overrides,
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        for part in optimizer.chained_optimizers:
            if isinstance(part.optimizer, torch.optim.AdamW):  # not apex's or Transformer Engine's, which are fused
                for group in part.optimizer.param_groups:
                    group.update(fused=True, foreach=False)
    schedules = Schedules(
        _of_groups(optimizer, None, stage, options.weight_decay),
        {part.name: _of_groups(optimizer, part.name, part.rates, part.weight_decay) for part in own},
        next((part.name if part in own else "" for part in parts if part.name == GATE and part.trains), None)
        if parts
        else "",
    )
    gather = WeightGather(wrapped, phases) if ddp_config.overlap_param_gather else None
    host = HostStates(_updated_parameters(wrapped, optimizer), device) if options.state == "host" else None
    return Trainable(wrapped, optimizer, schedules, options.clip_grad, device, phases, gather, host)


def _updated_parameters(wrapped: nn.Module, optimizer: ChainedOptimizer) -> list[Updated]:
    """What this rank updates, in the order of the model."""
    group_of = {id(main): group for group in optimizer.param_groups for main in group["params"]}
    found = []
    for parameter in wrapped.parameters():
        if parameter.requires_grad and (part := owned(optimizer, parameter)) != slice(0):
            main = updated(optimizer, parameter)
            found.append(Updated(parameter, part, main, group_of[id(main)]))
    return found


def names_of(part: str) -> str:
    """The pattern of a part's parameters' names in the whole model."""
    return {GATE: "*fusion.gate.*", HEADS: "*fusion.heads.*"}.get(part, f"*specialists.{part}.*")


def _settings(rates: Stage, weight_decay: float) -> tuple[Any, ...]:
    """Where these are equal, groups have the same rates and decay."""
    return rates.lr, rates.min_lr, rates.warmup_steps, rates.schedule, weight_decay


def _of_groups(
    optimizer: MegatronOptimizer, part: str | None, rates: Stage, weight_decay: float
) -> tuple[OptimizerParamScheduler, dict[str, float]]:
    """The schedule of a part's groups, or of those that are no part's, and a group that tells its rate."""
    probe: dict[str, float] = {}
    groups = [group for group in optimizer.param_groups if group.get(_PART) == part]
    for group in groups:
        group |= {"max_lr": rates.lr, "min_lr": rates.min_lr}
    return make_schedule(SimpleNamespace(param_groups=[*groups, probe]), rates, weight_decay), probe


def _finalize_gradients(
    phases: Phases,
    model: list[nn.Module],
    num_tokens: object = None,
    *,
    pg_collection: ProcessGroupCollection,
    **options: Any,
) -> None:
    """Megatron's sums over replicas and ranks, without its division by a number of tokens, and those of shared rows."""
    with phases("gradients"):
        finalize_model_grads(model, None, pg_collection=pg_collection, **options)
        for chunk in model:
            sum_shared_gradients((p for p in chunk.parameters() if p.requires_grad), pg_collection.tp)


def make_schedule(optimizer: MegatronOptimizer, stage: Stage, weight_decay: float) -> OptimizerParamScheduler:
    """The stage's rates as this module describes them, into the groups of ``optimizer``; those of step 1 at once."""
    peak = max(stage.warmup_steps, 1)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,  # of a step 0, from which groups of any rate warm up in proportion
        max_lr=stage.lr,
        min_lr=stage.min_lr,
        lr_warmup_steps=peak,
        lr_decay_steps=max(stage.steps, peak) + 1,
        lr_decay_style=stage.schedule,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    schedule.step(1)
    return schedule


def _fresh_parameters(module: nn.Module) -> None:
    """Replace parameters by new ones over the same storage, so that no hook of an earlier stage is left on them."""
    for child in module.modules():
        for name, old in child.named_parameters(recurse=False):
            new = nn.Parameter(old.data, requires_grad=old.requires_grad)
            marks = {key: value for key, value in vars(old).items() if key not in ("main_grad", "main_param")}
            new.__dict__.update(marks)
            if isinstance(child, nn.ParameterDict):
                child[name] = new
            else:
                setattr(child, name, new)
