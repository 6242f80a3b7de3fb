"""``layouts`` and ``parallel``: how the specialists are spread over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from ultrafuser_mega.config.section import Section


class Sizes(Section):
    """A specialist's place in a disjoint layout."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    first_rank: NonNegativeInt | None = Field(None, description="inside a replica; default: after the one before")


class DisjointLayout(Section):
    """Every specialist on its own ranks."""

    kind: Literal["disjoint"]
    specialists: dict[str, Sizes] = Field(description="specialist name -> tp, pp; every specialist must appear")
    dp: PositiveInt = Field(1, description="replicas of the whole fused model")


class ColocatedLayout(Section):
    """All specialists on the same ranks, one after the other."""

    kind: Literal["colocated"]
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt = 1


Layout = Annotated[DisjointLayout | ColocatedLayout, Field(discriminator="kind")]


class Parallel(Section):
    """What the layouts do not say."""

    sequence_parallel: bool = Field(False, description="shard activations between tensor-parallel regions by sequence")
    distributed_optimizer: bool = Field(False, description="shard stage 2's optimizer state over the dp replicas")
    recompute_layers: NonNegativeInt | Literal["all"] = Field(
        0,
        description="layers of a pipeline stage that the backward computes anew: less memory, up to a third slower",
    )
