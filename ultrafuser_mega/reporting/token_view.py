"""One self-contained HTML page: response tokens coloured by the specialist that leads them.

The paper's figures 8 and 9 for a few samples. A token has the colour of the specialist with the
largest gate weight, the stronger the larger that weight is; hovering shows all weights and the
token's loss. No script, no font and nothing else is loaded from anywhere; every text is escaped;
light and dark mode follow the reader's system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.palette import specialist_colors

_FAINTEST, _STRONGEST = 0.12, 0.56  # opacity at equal weights and at weight 1: text contrast stays above 4.5
_LONG_PROMPT = 280  # characters; longer ones are folded
_INCOMPLETE = "\ufffd"  # what decoding gives for a part of a character


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """One held-out sample as the fused model saw it; T response tokens, n specialists."""

    class_name: str
    prompt: str
    tokens: Sequence[str]  # (T,) the text of every response token, spaces and line breaks included
    weights: np.ndarray  # (T, n) gate weights, rows sum to 1
    losses: np.ndarray  # (T,) nats


def token_texts(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds, for any tokenizer: joined, they are the decoded text.

    A token that ends within a character (byte fallback) adds "", the one that completes it adds
    the character. ``decode`` maps ids to text, for example ``tokenizer.decode``.
    """
    texts: list[str] = []
    begin = shown = 0  # decode [begin, end) against [begin, shown): linear, and no token loses its leading space
    for end in range(1, len(token_ids) + 1):
        before = decode(list(token_ids[begin:shown])) if shown > begin else ""
        after = decode(list(token_ids[begin:end]))
        if after.endswith(_INCOMPLETE) and end < len(token_ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        begin, shown = shown, end
    return texts


def write_token_view(
    path: str | Path,
    samples: Sequence[TokenSample],
    specialists: Sequence[str],
    *,
    title: str = "Which specialist leads which token",
) -> Path:
    """Write the page and return its path.

    Raises:
        InputError: no sample, or a sample whose arrays do not fit its tokens and the specialists.
    """
    if not samples:
        raise InputError("write_token_view: no sample to show; give at least one")
    for index, sample in enumerate(samples):
        _check(index, sample, len(specialists))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(samples, specialists, title), encoding="utf-8")
    return path


def _check(index: int, sample: TokenSample, n: int) -> None:
    tokens = len(sample.tokens)
    shapes = np.shape(sample.weights), np.shape(sample.losses)
    if shapes != ((tokens, n), (tokens,)) or tokens == 0:
        raise InputError(
            f"write_token_view: sample {index} has {tokens} tokens, weights {shapes[0]}, losses {shapes[1]}; "
            f"expected weights ({tokens}, {n}) and losses ({tokens},) of at least one token"
        )


def _page(samples: Sequence[TokenSample], specialists: Sequence[str], title: str) -> str:
    colors = specialist_colors(specialists).values()
    rules = f":root {{ --strong: {_STRONGEST}; }}\n"
    rules += "\n".join(f".s{index} {{ --rgb: {_rgb(color)}; }}" for index, color in enumerate(colors))
    chips = "".join(f'<span class="chip s{index}">{escape(name)}</span>' for index, name in enumerate(specialists))
    scale = "".join(
        f'<i style="--a:{_opacity(weight, len(specialists)):.2f}">{weight:.2f}</i>'
        for weight in np.linspace(1 / len(specialists), 1.0, 5)
    )
    cards = "\n".join(_card(index, sample, specialists) for index, sample in enumerate(samples, start=1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_CSS}
{rules}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="intro">Every response token has the colour of the specialist with the largest gate weight, stronger for a
larger weight. Hover over a token for all weights and its loss.</p>
<div class="legend">{chips}<span class="scale"><small>leading weight</small>{scale}</span></div>
<main>
{cards}
</main>
</body>
</html>
"""


def _card(number: int, sample: TokenSample, specialists: Sequence[str]) -> str:
    weights = np.asarray(sample.weights, dtype=float)  # (T, n)
    losses = np.asarray(sample.losses, dtype=float)  # (T,)
    tokens = "".join(
        _token(text, row, loss, specialists) for text, row, loss in zip(sample.tokens, weights, losses, strict=True)
    )
    return f"""<section>
<h2>{escape(sample.class_name)} data <small>sample {number} &middot; {len(losses)} response tokens &middot; \
mean loss {losses.mean():.3f} nats</small></h2>
{_bar(weights.mean(axis=0), specialists)}
{_prompt(sample.prompt)}
<div class="response">{tokens}</div>
</section>"""


def _bar(average: np.ndarray, specialists: Sequence[str]) -> str:  # average (n,)
    parts = "".join(
        f'<span class="s{index}" style="flex-grow:{max(weight, 0.0):.4f}" title="{escape(name)} {weight:.3f}">'
        f"{escape(name)} {weight:.2f}</span>"
        for index, (name, weight) in enumerate(zip(specialists, average, strict=True))
    )
    return f'<div class="bar">{parts}</div>'


def _prompt(prompt: str) -> str:
    if len(prompt) <= _LONG_PROMPT:
        return f'<div class="prompt">{escape(prompt)}</div>'
    summary = f"<span>{escape(prompt[:_LONG_PROMPT])}&hellip;</span><em>prompt</em>"
    return f'<details class="prompt"><summary>{summary}</summary>{escape(prompt)}</details>'


def _token(text: str, weights: np.ndarray, loss: float, specialists: Sequence[str]) -> str:  # weights (n,)
    leader = int(weights.argmax())
    shares = "  ".join(f"{name} {weight:.2f}" for name, weight in zip(specialists, weights, strict=True))
    opacity = _opacity(float(weights[leader]), len(specialists))
    return (
        f'<span class="s{leader}" style="--a:{opacity:.2f}" title="{escape(shares)}&#10;loss {loss:.2f} nats">'
        f"{_visible(text)}</span>"
    )


def _visible(text: str) -> str:
    """The token as it reads, with a mark where it would be invisible: a line break, or a part of a character."""
    if not text:
        return "&#9647;"
    return escape(text).replace("\n", "<u>&#8629;</u>\n")


def _opacity(weight: float, n: int) -> float:
    """From equal weights 1/n (the least that a leader can have) to 1, spread over the readable range."""
    share = (weight - 1 / n) / (1 - 1 / n) if n > 1 else 1.0
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return _FAINTEST + (_STRONGEST - _FAINTEST) * share


def _rgb(color: str) -> str:
    return " ".join(str(int(color[start : start + 2], 16)) for start in (1, 3, 5))


_CSS = """
:root { --page: #f6f8fa; --card: #ffffff; --ink: #1f2328; --muted: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #151b23; --ink: #f0f6fc; --muted: #9198a1; --line: #3d444d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.4rem; }
.intro { margin: .25rem 0 .75rem; color: var(--muted); font-size: .9rem; }
h2 { margin: 0 0 .75rem; font-size: 1.05rem; }
h2 small { margin-left: .5rem; color: var(--muted); font-weight: normal; }
section { margin-top: 1.25rem; padding: 1.1rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.legend { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: var(--page);
  display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; font-size: .85rem; }
.chip { padding: .1rem .7rem; border-radius: 1rem; background: rgb(var(--rgb) / var(--strong)); }
.scale { display: flex; align-items: center; margin-left: auto; }
.scale small { margin-right: .5rem; color: var(--muted); }
.scale i { padding: .1rem .5rem; font-style: normal; background: rgb(127 127 127 / var(--a)); }
.bar { display: flex; gap: 2px; height: 1.5rem; border-radius: 4px; overflow: hidden; font-size: .78rem;
  line-height: 1.5rem; }
.bar span { flex-basis: 0; min-width: 0; overflow: hidden; padding-left: .5rem; white-space: nowrap;
  background: rgb(var(--rgb) / var(--strong)); }
.prompt { margin: .9rem 0; padding-left: .8rem; border-left: 3px solid var(--line); color: var(--muted);
  font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt summary { cursor: pointer; }
.prompt[open] summary span, .prompt:not([open]) summary em { display: none; }
.response { font: .9rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.response span { padding: .16em 0; border-radius: 2px; background: rgb(var(--rgb) / var(--a)); }
.response span:hover { outline: 2px solid var(--ink); }
.response u { text-decoration: none; opacity: .45; }
"""
