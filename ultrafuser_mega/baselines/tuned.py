"""What baselines that ``tuning`` trains have in common: configuration, token store, and the folder they end as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.baselines.derived import begin_derived, derived_config, steps_of_both_stages, train_in_full
from ultrafuser_mega.baselines.folder import Account, new_folder, write_beside_weights, write_card
from ultrafuser_mega.baselines.heldout import Model
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.models.dtypes import DTYPES
from ultrafuser_mega.planning.preflight import RunPlan, first_layouts_ranks, preflight
from ultrafuser_mega.reporting.records import FUSED, MEAN, write_summary
from ultrafuser_mega.training.prepare import prepare


def tuned_config(config: FuserConfig, method: str) -> FuserConfig:
    """The run of a baseline: the samples of both stages at stage 2's rates, on the fused run's token store.

    Raises:
        InputError: the run of ``config`` cannot begin with its specialists' folders.
    """
    tree = begin_derived(config)
    tree["name"] = f"{config.name}-{method}"
    tree["data"]["store"] = str(config.store_dir)
    train_in_full(tree, steps_of_both_stages(config))
    return derived_config(tree)


def opened(config: FuserConfig) -> tuple[RunPlan, TokenStore]:
    """The run's plan and its token store, made where it is missing; raises InputError for what is wrong with either."""
    plan = preflight(config, first_layouts_ranks(config), resume=False)
    prepare(config, plan.vocab_size)
    return plan, TokenStore.open(config.store_dir, verify=True)


def save_weights(model: Model, folder: Path, config: FuserConfig) -> torch.dtype:
    """The model's safetensors as transformers writes them, in the run's element type."""
    dtype = DTYPES[config.dtype]
    model.to(dtype).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors writes them for their owner alone
    return dtype


def write_tuned(out: Path, model: Model, account: Account, summary: Mapping[str, Any], vocab_size: int) -> None:
    """The folder of a model that was trained, with its card, its losses and what it was made of."""
    with new_folder(out) as folder:
        dtype = save_weights(model, folder, account.config)
        write_beside_weights(folder, account, model.config.to_diff_dict(), vocab_size, dtype)
        losses = {name: models[FUSED] for name, models in summary["eval"].items() if name != MEAN}
        write_card(folder, account, out.name, losses)
        write_summary(folder, summary)
