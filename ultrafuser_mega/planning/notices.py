"""What a run does with its specialists' folders and its ranks that its user may not expect, in a line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.sources import (
    element_types,
    held_types,
    large_beside_weights,
    read_sources,
    rounding,
    trained_specialists,
)
from ultrafuser_mega.config import HEADS, FuserConfig
from ultrafuser_mega.data.templates import load_template, other_than_own
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.models.hf_folder import Architecture, unread_fields


def idle_replicas(config: FuserConfig, dp: int) -> tuple[str, ...]:
    """Lines for people: stages with fewer samples in a step than there are replicas."""
    classes = len(config.data.classes)
    return tuple(
        f"stage {number}: {dp} replicas for {classes} x {stage.samples_per_class} samples a step: "
        f"{dp - classes * stage.samples_per_class} of them have nothing to do"
        for number, stage in config.stages.items()
        if classes * stage.samples_per_class < dp
    )


def unused_adapters(config: FuserConfig) -> tuple[str, ...]:
    """A line for people where ``lora`` is given and no stage trains any; a distillation keeps the fused run's."""
    if config.lora is None or config.adapters or config.distil is not None:
        return ()
    return ("note: lora: no stage trains adapters; stage2.train={specialists: lora} would",)


def folder_notices(
    config: FuserConfig,
    architectures: Mapping[str, Architecture],
    encoders: Mapping[str, TextEncoder],
    dtype: torch.dtype,
    start: tuple[Progress, Path] | None,
) -> tuple[str, ...]:
    """Lines for people: what is rounded to ``dtype`` on loading, which heads training unties, which large files
    checkpoints keep, which fields say nothing.

    Raises:
        InputError: the weights, in the specialists' folders or in the checkpoint ``start``, cannot be read.
    """
    kept = read_sources(start[1]) if start else {}
    lines = []
    for name, arch in architectures.items():
        types = (
            held_types(start[1], kept[name], trained=name in trained_specialists(start[1], start[0]))
            if start
            else element_types(config.folders[name])
        )
        if lost := rounding(types, dtype):
            lines.append(f"specialists.{name}: {lost} (dtype: {config.dtype}); dtype=fp32 keeps them as they are")
        apart = [
            number
            for number in config.stages
            if any(config.parts(number)[part].mode == "full" for part in (HEADS, name))
        ]
        if arch.tied and apart:
            lines.append(
                f"specialists.{name}: its folder ties the output head to the embedding; stage {apart[0]} trains them "
                "apart, so its export holds both (tie_word_embeddings: false)"
            )
        for file in large_beside_weights(kept[name].folder if start else config.folders[name]):
            lines.append(
                f"specialists.{name}: every checkpoint and export keeps {file}, which has no name that weights have; "
                "move it elsewhere if the model does not need it"
            )
    for name, folder in config.folders.items():
        encoder, chosen = encoders[name], config.specialists[name].template
        if other_than_own(load_template(chosen, encoder.tokenizer, str(folder)), encoder, str(folder)):
            lines.append(
                f"specialists.{name}: template {chosen} asks otherwise than the chat template in {folder}; "
                "is it the one that the model was trained with?"
            )
    fields = dict.fromkeys(notice for folder in config.folders.values() for notice in unread_fields(folder))
    return (*lines, *(f"note: {notice}" for notice in fields))
