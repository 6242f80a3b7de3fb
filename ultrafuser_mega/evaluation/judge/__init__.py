"""Judged benchmarks: who judges, what is asked, what the replies are worth, and what they cost.

judge = open_judge("openai:gpt-4o", out / "judge.jsonl", prices=(2.5, 10.0))
samples = grade_chats(judge, samples, {item.id: item for item in items})
"""

from ultrafuser_mega.evaluation.judge.judges import Endpoint, FileJudge, Judge, Spent, check_judge, open_judge
from ultrafuser_mega.evaluation.judge.ledger import Ledger, Reply, Request
from ultrafuser_mega.evaluation.judge.verdicts import grade_chats, judge_pairs, select_answers

__all__ = [
    "Endpoint",
    "FileJudge",
    "Judge",
    "Ledger",
    "Reply",
    "Request",
    "Spent",
    "check_judge",
    "grade_chats",
    "judge_pairs",
    "open_judge",
    "select_answers",
]
