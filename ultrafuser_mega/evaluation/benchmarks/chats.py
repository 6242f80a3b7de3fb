"""What a judge has to read: AlpacaEval (Li et al. 2023) and MT-Bench (Zheng et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultrafuser_mega.evaluation.benchmark import Item, Score
from ultrafuser_mega.evaluation.benchmarks.files import JsonlBenchmark

#: UltraFuser, table 10.
_PROMPT = "Please give helpful, very detailed, and polite answer to the user's question below. \n Question: {question}"
#: Whose reference answers the judge is shown (FastChat's NEED_REF_CATS).
_WITH_REFERENCE = ("math", "reasoning", "coding")


class AlpacaEval(JsonlBenchmark):
    """How often a judge prefers the reply to another's.

    A row may bring the reply to compare with ("output", as AlpacaEval's own file of references has it); the item's
    reference is {"instruction", "output"}, the latter None where the row has none.
    """

    name = "alpacaeval"
    title = "AlpacaEval"
    domain = "text"
    metric = "Win Rate"
    source = "alpaca_eval_instructions.jsonl"
    origin = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval, alpaca_eval.json, one row to a line"
    max_new_tokens = 2048
    judged = True
    fields = {"instruction": str}  # noqa: RUF012

    def item(self, row: dict[str, Any], number: int) -> Item:
        ask, output = _PROMPT.format(question=row["instruction"]), row.get("output")
        if not isinstance(output, str | None):
            raise ValueError(f"output must be the reply to compare with, a text, not {output!r}")
        reference = {"instruction": row["instruction"], "output": output}
        return Item(f"alpacaeval/{number}", (ask,), reference)

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        return Score(None)


class MtBench(JsonlBenchmark):
    """Two turns in eight categories, each graded from 1 to 10.

    The item's reference is the list of answers that the judge compares with, in mathematics, reasoning and coding; None
    where there is none.
    """

    name = "mt_bench"
    title = "MT-Bench"
    domain = "text"
    metric = "Rating"
    source = "mt_bench_question.jsonl"
    origin = "https://github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl"
    max_new_tokens = 1024
    judged = True
    scale = 10.0
    fields = {"question_id": int, "category": str, "turns": list}  # noqa: RUF012

    def item(self, row: dict[str, Any], number: int) -> Item:
        turns, reference = row["turns"], row.get("reference")
        if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"turns must be two texts, not {turns}")
        if row["category"] not in _WITH_REFERENCE:
            reference = None
        if reference is not None and not (
            isinstance(reference, list) and len(reference) == len(turns) and all(isinstance(r, str) for r in reference)
        ):
            raise ValueError("reference must be a text for every turn")
        return Item(f"mt_bench/{row['question_id']}", tuple(turns), reference, category=row["category"])

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        return Score(None)
