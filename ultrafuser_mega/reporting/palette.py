"""One colour per specialist, the same in every plot and page.

The first six are the Okabe-Ito colours that read well as lines on white; they stay apart for the
common forms of colour blindness. Two darker ones from Paul Tol's "muted" set follow.
"""

from __future__ import annotations

from collections.abc import Sequence

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
INK = "#1f2328"  # text and the fused model's own marks
MUTED = "#6e7781"  # axes, captions, secondary text
FAINT = "#d8dee4"  # grid lines and separators


def specialist_colors(specialists: Sequence[str]) -> dict[str, str]:
    """Specialist -> "#rrggbb", by position; past eight specialists the colours repeat."""
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(specialists)}
