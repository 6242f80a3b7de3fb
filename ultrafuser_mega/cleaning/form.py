"""Whether a reply has the form that its question asks for in so many words.

Few demands, each told by words that hardly mean anything else: a row is removed on their account.
"""

from __future__ import annotations

import json
import re

_TELL = r"\b(?:answer|respond|reply|output|return|give|provide|present|format|state|say)\b"
_JSON = re.compile(rf"{_TELL}[^.?!\n]{{0,60}}\b(?:in|as|using)\s+(?:an?\s+)?(?:valid\s+|well-formed\s+)?json\b", re.I)
_YES_OR_NO = re.compile(rf"{_TELL}[^.?!\n]{{0,40}}\byes\W{{0,3}}(?:or|/)\W{{0,3}}no\b", re.IGNORECASE)
_BOXED = re.compile(r"\b(?:put|write|give|place|enclose|within|inside|in)\b[^.?!\n]{0,80}\\boxed\b", re.IGNORECASE)
_LANGUAGE = (
    r"(?:python|java|javascript|js|typescript|c\+\+|c#|sql|mysql|php|ruby|rust|go|golang|perl|html|css|"
    r"react|node\.?js|swift|kotlin|scala|haskell|matlab|r)"
)
_PROGRAM = re.compile(
    r"\A\W*(?:please |can you |could you )?(?:write|create|implement|develop|construct|code)\b[^.?!\n]{0,60}?"
    rf"(?:\b{_LANGUAGE} (?:function|program|script|method|class|code|query|snippet|command|module)\b"
    rf"|\b(?:function|program|script|method|class|code|query)s? (?:in|using) {_LANGUAGE}(?!\w))",
    re.IGNORECASE,
)
_ANY_PROGRAM = re.compile(
    r"\b(?:function|program|script|code|class|api|endpoint|quer(?:y|ies)|method)\b", re.IGNORECASE
)
_CODE = re.compile(
    r"```|`[^`\n]+`|[{};]|\w\([^)\n]{0,500}\)|</?\w+[^>\n]{0,500}>|[\w\])] *[-+*/]?={1,2} *\S|\\[dwsb]"
    r"|^[^\S\n]*(?:\$|#!)"
    r"|\b(?:select|update|insert|delete|create|alter|drop|def|class|import|echo|print|grep|awk|sed|return)\b",
    re.IGNORECASE | re.MULTILINE,
)


def missing_form(question: str, reply: str) -> str | None:
    """The form that ``question`` asks for and ``reply`` does not have; None: there is none such."""
    if _PROGRAM.search(question):
        return None if _CODE.search(reply) else "a program is asked for, there is no code"
    if _BOXED.search(question) and "\\boxed" not in reply:
        return "\\boxed{} is asked for"
    if _ANY_PROGRAM.search(question):  # which may be to print JSON or yes
        return None
    if _JSON.search(question) and not _holds_json(reply):
        return "JSON is asked for"
    if _YES_OR_NO.search(question) and not re.search(r"\b(?:yes|no)\b", reply, re.IGNORECASE):
        return "yes or no is asked for"
    return None


def _holds_json(text: str) -> bool:
    """Whether an object or a list of JSON stands somewhere in a text."""
    decoder = json.JSONDecoder()
    for found in list(re.finditer(r"[{\[]", text))[:20]:
        try:
            decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        return True
    return False
