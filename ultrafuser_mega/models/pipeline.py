"""How a specialist's layers are cut into pipeline stages."""

from __future__ import annotations


def stage_layers(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each of ``pp`` stages, as even as Megatron cuts them: all inner stages hold the same number.

    Where that leaves the first and the last unequal, the last has fewer: it holds heads and gate as well.

    Raises:
        ValueError: there are more stages than layers.
    """
    if not 1 <= pp <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {pp} stages")
    inner = -(-layers // pp)
    if layers - inner * (pp - 2) < 2:  # nothing would be left for the first and the last
        inner = layers // pp
    outer = layers - inner * max(pp - 2, 0)
    if pp == 1:
        return (outer,)
    return (outer - outer // 2, *[inner] * (pp - 2), outer // 2)
