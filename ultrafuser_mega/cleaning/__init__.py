"""Instruction data without what spoils it: copies, refusals, broken code, benchmarks' items. Needs no model.

from ultrafuser_mega.cleaning import NearDuplicates, Rules, clean

kept, removed, report = clean(rows, Rules(languages=("en",)))
"""

from ultrafuser_mega.cleaning.clean import Cleaned, Cleaner, Removed, clean
from ultrafuser_mega.cleaning.contamination import Benchmarks, BenchmarkText
from ultrafuser_mega.cleaning.duplicates import Match, NearDuplicates
from ultrafuser_mega.cleaning.report import Report
from ultrafuser_mega.cleaning.rules import RULES, Finding, Rules

__all__ = [
    "RULES",
    "BenchmarkText",
    "Benchmarks",
    "Cleaned",
    "Cleaner",
    "Finding",
    "Match",
    "NearDuplicates",
    "Removed",
    "Report",
    "Rules",
    "clean",
]
