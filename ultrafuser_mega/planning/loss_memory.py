"""What the loss holds of a rank's memory: rows of hidden states, gate, logits, and what becomes gradients of them.

Symbols as in ``memory.py``.
"""

from __future__ import annotations

from typing import Literal

import torch

from ultrafuser_mega.config import HEADS
from ultrafuser_mega.ops import planes
from ultrafuser_mega.ops.chunk import buffer_numbers
from ultrafuser_mega.ops.distillation import LESSON_BYTES
from ultrafuser_mega.ops.forward import BLOCK_COLUMNS, BUFFER_BYTES, block_columns, column_blocks, cut, even_rows
from ultrafuser_mega.ops.gemm import UPCAST_BLOCK
from ultrafuser_mega.planning.microbatch import Microbatch
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import Role
from ultrafuser_mega.planning.trained import NUMBER, WIDE, Trains

Device = Literal["cpu", "cuda"]

STUDENT_STATISTICS = 9  # float32 numbers of a student's row that ranks share
_PUT_TOGETHER = 2 * STUDENT_STATISTICS  # of a row and a part of the vocabulary, while the parts' become those of all


def loss_bytes(plan: RunPlan, role: Role, microbatch: Microbatch, device: Device, trains: Trains) -> float:
    """The most that the loss of a stage holds beside activations; 0 on a rank that has no loss."""
    if not role.is_last:
        return 0.0
    if plan.config.student is not None:
        return _student_loss(plan, role, microbatch, device, trains, plan.config.student)
    if trains.gate_alone:
        return _gate_loss(plan, role, microbatch, device)
    return _mixture_loss(plan, role, microbatch, device, trains)


def _widths(plan: RunPlan) -> int:
    return sum(arch.hidden_size for arch in plan.architectures.values())


def _own_widths(plan: RunPlan, role: Role, trains: Trains | None = None) -> int:
    names = [name for name in role.names if trains is None or trains.backward(name)]
    return sum(plan.architectures[name].hidden_size for name in names)


def exchange_numbers(plan: RunPlan, role: Role, rows: float, trains: Trains | None = None) -> float:
    """Numbers of the exchange's buffer: slots as large as the largest share; with ``trains`` of gradients alone."""
    slots: dict[int, float] = {}
    for name, placement in plan.layout.placements.items():
        if trains is not None and not trains.backward(name):
            continue
        for rank in placement.last_stage:
            share = -(-rows // placement.tp) * plan.architectures[name].hidden_size
            slots[rank] = slots.get(rank, 0.0) + share
    return role.fusion * max(slots.values())


def _mixture_loss(plan: RunPlan, role: Role, microbatch: Microbatch, device: Device, trains: Trains) -> float:
    """The chunked loss with gate and exchange, at its fullest.

    Forward: hidden rows (b N D; disjoint also the rank's own before the exchange), the gate's activations (b + 4 per
    row, specialist and unit), a chunk's logits, inputs and their gradients (``ops.chunked``) or every specialist's
    logits of all rows (``ops.planes``), and the gradients that form there: b V D of heads, b N D of rows, where they
    train. Backward: rows, gate, and these; when all but the rows' gradients is gone, the exchange's float32 buffer.
    """
    width, rows, total = NUMBER[plan.config.dtype], microbatch.rows, _widths(plan)
    states = width * rows * total
    own = width * rows * _own_widths(plan, role) if _is_exchanged(plan, role) else 0.0
    gate = _gate_bytes(plan, role, rows)
    operand = WIDE if device == "cpu" else width
    _, chunk, row_bytes = cut(int(rows), plan.vocab_size, role.fusion, total, operand, WIDE, BUFFER_BYTES[device])
    if in_planes(plan, role, rows, device):
        chunk, row_bytes = int(rows), planes.row_bytes(*_plane_sizes(plan, role, device))
        if not trains.whole(HEADS):  # whose gradients alone want hidden states again
            row_bytes -= operand * max(arch.hidden_size for arch in plan.architectures.values())
    single_product = chunk >= rows or rows <= total
    formed = trains.whole(HEADS) and not (device == "cpu" and chunk >= rows)  # where the product adds to the buffer
    head = role.vocab_rows * total * (operand if single_product else WIDE) * formed
    trained = [arch.hidden_size for name, arch in plan.architectures.items() if trains.backward(name)]
    given = width * rows * sum(trained)  # gradients of hidden states
    forward = own + states + gate + chunk * row_bytes + given + head
    rounded = role.vocab_rows * total * width if head and not single_product and device != "cpu" else 0
    heads = states + gate + given + head + rounded
    return max(forward, heads, given + _exchanged(plan, role, rows, trains))


def _student_loss(
    plan: RunPlan, role: Role, microbatch: Microbatch, device: Device, trains: Trains, student: str
) -> float:
    """A distillation's chunked loss with exchange, at its fullest (``ops.distillation``).

    Forward: hidden rows of all, a chunk's logits of teacher and student, the inputs of their products, statistics by
    shard or by block and, on a CPU, a block of a head in the products' type; of the student b N d of rows and, in
    float32, V d of its head. Backward: rows, and these, the head's once more in its own type; the exchange as for the
    mixture.
    """
    width, rows, total = NUMBER[plan.config.dtype], microbatch.rows, _widths(plan)
    own = plan.architectures[student].hidden_size
    held = width * rows * (total + (_own_widths(plan, role) if _is_exchanged(plan, role) else 0))
    operand = WIDE if device == "cpu" else width
    buffers, chunk, _ = cut(int(rows), 2 * plan.vocab_size, role.fusion, total, operand, WIDE, LESSON_BYTES[device])
    columns = len(role.vocabulary or ())
    on = torch.device(device)
    most = block_columns(columns, on, operand, WIDE)
    blocks = column_blocks(columns, most)
    logits = buffers * 2 * buffer_numbers(chunk, blocks, on) * WIDE
    parts = max(role.fusion, len(blocks))
    statistics = WIDE * STUDENT_STATISTICS * rows + (WIDE * _PUT_TOGETHER * chunk * parts if parts > 1 else 0)
    inputs = chunk * operand * (total + (buffers - 1) * own) + chunk * own * WIDE
    between = 0.0
    if operand != width:
        widest = max(arch.hidden_size for arch in plan.architectures.values())
        between = float(WIDE * min(columns, most, UPCAST_BLOCK) * widest)
    head = WIDE * role.vocab_rows * own if trains.whole(HEADS) else 0
    formed = width * rows * own + head
    forward = held + logits + inputs + between + formed + statistics
    rounded = head * width / WIDE if width != WIDE else 0.0
    return max(forward, held + formed + rounded, width * rows * own + _exchanged(plan, role, rows, trains))


def _is_exchanged(plan: RunPlan, role: Role) -> bool:
    """Whether ranks are sent rows of hidden states that they do not have."""
    return plan.layout.kind == "disjoint" and role.fusion > 1


def _exchanged(plan: RunPlan, role: Role, rows: float, trains: Trains) -> float:
    """The exchange's gradients on their way back, in float32, and the rank's own rows."""
    if role.fusion == 1 or not trains.states:
        return 0.0
    numbers = exchange_numbers(plan, role, rows, trains)
    # Where nothing of a rank trains, the loss's backward runs while its rows are still held.
    trains_here = any(trains.backward(name) for name in role.names)
    own = NUMBER[plan.config.dtype] * rows * _own_widths(plan, role, trains if trains_here else None)
    return numbers * WIDE * (1 + 1 / role.fusion) + own


def in_planes(plan: RunPlan, role: Role, rows: float, device: Device) -> bool:
    """Whether stage 2's loss of so many rows keeps every specialist's logits apart; only last stages have one."""
    return role.fusion > 0 and planes.pay_and_fit(int(rows), *_plane_sizes(plan, role, device), BUFFER_BYTES[device])


def _plane_sizes(plan: RunPlan, role: Role, device: Device) -> tuple[int, list[int], int, int]:
    operand = WIDE if device == "cpu" else NUMBER[plan.config.dtype]
    widths = [arch.hidden_size for arch in plan.architectures.values()]
    return -(-plan.vocab_size // role.fusion), widths, operand, WIDE


def _gate_loss(plan: RunPlan, role: Role, microbatch: Microbatch, device: Device) -> float:
    """Stage 1's loss: rows, and what they are received in, or then the gate and a chunk of all specialists' logits."""
    width, rows, count = NUMBER[plan.config.dtype], microbatch.rows, len(plan.architectures)
    columns = min(-(-plan.vocab_size // role.fusion), BLOCK_COLUMNS[device])
    chunk = even_rows(int(rows), BUFFER_BYTES[device] // (count * columns * WIDE))
    exchanged = _is_exchanged(plan, role)
    states = width * rows * (_widths(plan) + (_own_widths(plan, role) if exchanged else 0))
    slots = width * exchange_numbers(plan, role, rows) * (1 + 1 / role.fusion) if exchanged else 0.0
    return states + max(slots, _gate_bytes(plan, role, rows) + count * chunk * columns * WIDE)


def _gate_bytes(plan: RunPlan, role: Role, rows: float) -> float:
    """Active units, in the weights' type and in float32."""
    width = NUMBER[plan.config.dtype]
    return rows * len(plan.architectures) * role.gate_units * (width + (WIDE if width != WIDE else 0))
