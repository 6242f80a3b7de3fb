"""Layers over pipeline stages."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from ultrafuser_mega.models.pipeline import stage_layers


@pytest.mark.parametrize(
    ("layers", "pp", "stages"),
    [
        (40, 1, (40,)),
        (40, 4, (10, 10, 10, 10)),
        (4, 3, (1, 2, 1)),
        (5, 2, (3, 2)),
        (5, 4, (2, 1, 1, 1)),
        (22, 4, (5, 6, 6, 5)),
        (3, 3, (1, 1, 1)),
    ],
)
def test_stages_are_as_even_as_equal_inner_ones_allow(layers: int, pp: int, stages: tuple[int, ...]) -> None:
    assert stage_layers(layers, pp) == stages


@pytest.mark.parametrize("layers", range(1, 41))
def test_every_layer_has_one_stage_and_megatron_cuts_the_same(layers: int) -> None:
    for pp in range(1, layers + 1):
        stages = stage_layers(layers, pp)
        assert len(stages) == pp and sum(stages) == layers and min(stages) >= 1
        even = len(set(stages)) == 1
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=None if pp == 1 else torch.float32,
            num_layers_in_first_pipeline_stage=None if even else stages[0],
            num_layers_in_last_pipeline_stage=None if even else stages[-1],
        )
        assert [get_num_layers_to_build(config, pp_rank=rank) for rank in range(pp)] == list(stages)
        offsets = [get_transformer_layer_offset(config, pp_rank=rank) for rank in range(pp)]
        assert offsets == [sum(stages[:rank]) for rank in range(pp)]


def test_more_stages_than_layers_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages"):
        stage_layers(2, 3)
