"""A kernel's loops over k, as they stand in the machine code that cuobjdump lists.

What keeps tensor cores fed is what a loop does per instruction of theirs: other instructions, whether operands come
straight from shared memory, how often warps wait for each other, and that nothing goes to memory for want of registers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TENSOR_CORE = r"\b(HGMMA|UTC[A-Z]*MMA|HMMA)\b"  # Hopper's wgmma, Blackwell's tcgen05, mma
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_TARGET = re.compile(r"\bBRA\b[^;]*?\b0x([0-9a-f]+)")
_FROM_REGISTERS = re.compile(r"HGMMA\.\S+ R\d+, R\d+, gdesc")


@dataclass(frozen=True)
class MainLoop:
    """One trip through a loop that holds tensor-core instructions and no smaller such loop."""

    instructions: int
    products: int  # instructions of the tensor cores
    form: str  # of these: HGMMA.64x256x16 multiplies 64 x 16 by 16 x 256
    from_registers: int  # products whose left operand has passed through registers; of wgmma alone
    barriers: int
    multiplications: int  # of numbers in fp32
    local_accesses: int  # loads and stores of spilled registers

    @property
    def per_product(self) -> float:
        """Instructions that a warp issues per tensor-core instruction, that one included."""
        return self.instructions / self.products


def main_loops(code: str) -> list[MainLoop]:
    """In the order of the code. ``code``: of one kernel, as ``cuobjdump -sass`` lists it."""
    found = [(int(at, 16), text.strip()) for at, text in _INSTRUCTION.findall(code)]
    spans = set()
    for at, text in found:
        target = _TARGET.search(text)
        if target and int(target[1], 16) <= at:
            spans.add((int(target[1], 16), at))
    bodies = {span: [text for at, text in found if span[0] <= at <= span[1]] for span in spans}
    busy = [span for span in sorted(spans) if any(re.search(TENSOR_CORE, text) for text in bodies[span])]
    return [_described(bodies[span]) for span in busy if not any(_outer(span, other) for other in busy)]


def _outer(span: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether span is the longer one of two that meet. A loop around others may begin in the middle of their last one:
    its compiler has moved the jump."""
    meet = span[0] <= other[1] and other[0] <= span[1]
    return meet and span[1] - span[0] > other[1] - other[0]


def _described(body: list[str]) -> MainLoop:
    operations = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in body]
    products = [name for name in operations if re.match(TENSOR_CORE, name)]
    kinds = [name.split(".")[0] for name in operations]
    return MainLoop(
        instructions=len(body),
        products=len(products),
        form=".".join(products[0].split(".")[:2]),
        from_registers=sum(1 for text in body if _FROM_REGISTERS.search(text)),
        barriers=kinds.count("BAR"),
        multiplications=kinds.count("FMUL"),
        local_accesses=kinds.count("LDL") + kinds.count("STL"),
    )
