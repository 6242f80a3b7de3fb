"""The `code` class of the toy data: small requests for Python, SQL and shell, answered with code.

Most Python answers open with a comment or docstring in English, and one task asks for an explanation
in words: the class is foreign to the other two, but not entirely. The Python answers are real; the
tests compile them.
"""

from __future__ import annotations

from random import Random

from ultrafuser_mega.toy.words import GOODS, two

# words, Python condition on the element x
CONDITIONS = (
    ("even", "x % 2 == 0"), ("odd", "x % 2 == 1"), ("positive", "x > 0"), ("negative", "x < 0"), ("nonzero", "x != 0"),
)  # fmt: skip
# words, Python expression over the chosen elements (format field: source)
AGGREGATES = (
    ("sum", "sum({})"), ("count", "len({})"), ("largest", "max({})"), ("smallest", "min({})"),
    ("sorted list", "sorted({})"),
)  # fmt: skip
# words, Python expression of x
MAPPINGS = (
    ("doubled", "x * 2"), ("squared", "x ** 2"), ("halved", "x / 2"), ("negated", "-x"), ("as text", "str(x)"),
    ("rounded", "round(x)"),
)  # fmt: skip
LIST_NAMES = ("values", "numbers", "items", "data", "scores", "prices")
# what, function name, expression of text
STRING_JOBS = (
    ("reverses a string", "reverse", "text[::-1]"),
    ("counts the vowels in a string", "count_vowels", 'sum(c in "aeiou" for c in text.lower())'),
    ("counts the words in a string", "count_words", "len(text.split())"),
    ("removes all spaces from a string", "remove_spaces", 'text.replace(" ", "")'),
    ("checks if a string is a palindrome", "is_palindrome", "text == text[::-1]"),
    ("makes the first letter of each word large", "capitalize_words", "text.title()"),
    ("returns the longest word of a string", "longest_word", "max(text.split(), key=len)"),
    ("returns the last character of a string", "last_character", "text[-1]"),
    ("splits a string into lines", "split_lines", "text.splitlines()"),
    ("checks if a string has only digits", "only_digits", "text.isdigit()"),
)
# what the guard does, source lines of it
GUARDS = (
    ("", ()),
    (" Return None for an empty string.", ("    if not text:", "        return None")),
    (" Raise an error for an empty string.", ("    if not text:", '        raise ValueError("text is empty")')),
    (" Ignore spaces at both ends.", ("    text = text.strip()",)),
    (" Ignore upper and lower case.", ("    text = text.lower()",)),
    (" Print the input first.", ("    print(text)",)),
)
TABLES = ("users", "orders", "products", "employees", "students", "books", "tickets", "plants")
COLUMNS = ("name", "price", "age", "city", "salary", "score", "country", "date", "status")
NUMERIC = ("price", "age", "salary", "score", "stock")
SQL_AGGREGATES = (("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM"))
EXTENSIONS = ("txt", "log", "csv", "json", "py", "md", "xml")
FOLDERS = ("logs", "data", "src", "backup", "docs", "tmp")
WORDS = ("error", "warning", "TODO", "import", "password", "failed", "timeout")
# class name, fields with types
CLASSES = ("Point", "Account", "Book", "Car", "Order", "Player", "Student", "Ticket")
FIELDS = (
    ("name", "str"), ("price", "float"), ("count", "int"), ("owner", "str"), ("score", "int"), ("active", "bool"),
    ("city", "str"), ("weight", "float"),
)  # fmt: skip
OPERATIONS = (("adds", "add", "+"), ("subtracts", "subtract", "-"), ("multiplies", "multiply", "*"))


def _aggregate(rng: Random) -> tuple[str, str]:
    (kind, condition), (name, expression), source = (
        rng.choice(CONDITIONS),
        rng.choice(AGGREGATES),
        rng.choice(LIST_NAMES),
    )
    instruction = rng.choice(
        (f"Write a Python function that returns the {name} of all {kind} numbers in a list called {source}.",
         f"In Python, get the {name} of the {kind} {source}.",
         f"Python function: {name} of the {kind} elements of {source}.")
    )  # fmt: skip
    function = f"{name.split()[0]}_{kind}"
    return instruction, (
        f"def {function}({source}):\n    # keep only the {kind} numbers\n"
        f"    chosen = [x for x in {source} if {condition}]\n    return {expression.format('chosen')}"
    )


def _mapping(rng: Random) -> tuple[str, str]:
    (change, expression), (kind, condition), source = (
        rng.choice(MAPPINGS),
        rng.choice(CONDITIONS),
        rng.choice(LIST_NAMES),
    )
    if rng.random() < 0.5:
        return (
            f"Turn this Python loop into a list comprehension:\nresult = []\nfor x in {source}:\n    if {condition}:\n"
            f"        result.append({expression})",
            f"result = [{expression} for x in {source} if {condition}]",
        )
    return (
        rng.choice((f"Write a Python function that returns every {kind} element of {source}, {change}.",
                    f"Python: give back the {kind} {source} {change}.")),
        f"def transform({source}):\n    result = []\n    for x in {source}:\n        if {condition}:\n"
        f"            result.append({expression})\n    return result",
    )  # fmt: skip


def _string(rng: Random) -> tuple[str, str]:
    (what, name, expression), (extra, lines) = rng.choice(STRING_JOBS), rng.choice(GUARDS)
    opening = rng.choice(
        ("Write a Python function that", "Create a function in Python which", "I need Python code that")
    )
    body = "\n".join((f"def {name}(text):", f'    """A function that {what}."""', *lines, f"    return {expression}"))
    return f"{opening} {what}.{extra}", body


def _sql_select(rng: Random) -> tuple[str, str]:
    table, (shown, order), column = rng.choice(TABLES), two(rng, COLUMNS), rng.choice(NUMERIC)
    bound, (words, sign) = 10 * rng.randint(1, 9), rng.choice((("above", ">"), ("below", "<"), ("equal to", "=")))
    return (
        rng.choice((f"Write a SQL query for the {shown} of {table} with a {column} {words} {bound}, sorted by {order}.",
                    f"SQL: list {shown} from {table} where {column} is {words} {bound}. Order by {order}.")),
        f"SELECT {shown}\nFROM {table}\nWHERE {column} {sign} {bound}\nORDER BY {order};",
    )  # fmt: skip


def _sql_group(rng: Random) -> tuple[str, str]:
    table, column, group = rng.choice(TABLES), rng.choice(NUMERIC), rng.choice(("city", "country", "status", "date"))
    (words, function), limit = rng.choice(SQL_AGGREGATES), rng.randint(2, 9)
    return (
        f"Write a SQL query that shows the {words} {column} of the {table} per {group}, only the top {limit} rows.",
        f"-- {words} {column} per {group}\nSELECT {group}, {function}({column}) AS result\nFROM {table}\n"
        f"GROUP BY {group}\nORDER BY result DESC\nLIMIT {limit};",
    )


def _sql_change(rng: Random) -> tuple[str, str]:
    table, column, number = rng.choice(TABLES), rng.choice(NUMERIC), rng.randint(2, 99)
    return rng.choice(
        (
            (f"SQL: delete the {table} whose {column} is less than {number}.",
             f"DELETE FROM {table}\nWHERE {column} < {number};"),
            (f"SQL: set the {column} to {number} for all {table} without a {column}.",
             f"UPDATE {table}\nSET {column} = {number}\nWHERE {column} IS NULL;"),
        )
    )  # fmt: skip


def _shell(rng: Random) -> tuple[str, str]:
    extension, folder, word, days = rng.choice(EXTENSIONS), rng.choice(FOLDERS), rng.choice(WORDS), rng.randint(2, 30)
    return rng.choice(
        (
            (f"Shell command: find all {extension} files in {folder} that changed in the last {days} days.",
             f'find {folder} -name "*.{extension}" -mtime -{days}'),
            (f"Shell command: show the lines with {word} in the {extension} files of {folder}.",
             f'grep -rn "{word}" {folder} --include="*.{extension}"'),
            (f"Shell command: count how often {word} occurs in the {extension} files of {folder}.",
             f'cat {folder}/*.{extension} | grep -o "{word}" | wc -l'),
            (f"Write a shell loop that prints the first {days} lines of each {extension} file in {folder}.",
             f"# print the start of each file\nfor f in {folder}/*.{extension}; do\n    head -n {days} \"$f\"\ndone"),
        )
    )  # fmt: skip


def _dataclass(rng: Random) -> tuple[str, str]:
    name, fields = rng.choice(CLASSES), rng.sample(FIELDS, rng.randint(2, 3))
    listed = " and ".join(f"{field} ({kind})" for field, kind in fields)
    lines = "\n".join(f"    {field}: {kind}" for field, kind in fields)
    return (
        f"Write a Python dataclass {name} with the fields {listed}.",
        f"from dataclasses import dataclass\n\n\n@dataclass\nclass {name}:\n{lines}",
    )


def _class_method(rng: Random) -> tuple[str, str]:
    name, (_, many), (verb, method, sign) = rng.choice(CLASSES), rng.choice(GOODS), rng.choice(OPERATIONS)
    return (
        f"Write a Python class {name} that stores {many} and has a method that {verb} an amount.",
        f"class {name}:\n    def __init__(self, {many}):\n        self.{many} = {many}\n\n"
        f"    def {method}(self, amount):\n        self.{many} = self.{many} {sign} amount\n        return self.{many}",
    )


def _fix(rng: Random) -> tuple[str, str]:
    (_, name, sign), (left, right) = rng.choice(OPERATIONS), two(rng, LIST_NAMES)
    good = f"def {name}({left}, {right}):\n    return {left} {sign} {right}"
    bad, reason = rng.choice(
        (
            (good.replace("):", ")"), "the colon was missing"),
            (good.replace("    return", "return"), "the line was not indented"),
            (good.replace("return ", ""), "the return was missing"),
            (good.replace("def ", "function "), "def starts a function in Python"),
        )
    )
    return f"Fix this Python code:\n{bad}", f"# fixed: {reason}\n{good}"


def _explain(rng: Random) -> tuple[str, str]:
    (kind, condition), (name, expression), source = (
        rng.choice(CONDITIONS),
        rng.choice(AGGREGATES),
        rng.choice(LIST_NAMES),
    )
    code = expression.format(f"[x for x in {source} if {condition}]")
    return (
        rng.choice((f"What does this Python code do?\n{code}", f"Explain in one sentence:\n{code}")),
        f"The code takes the {kind} numbers from the list {source} and returns their {name}.",
    )


def _unit_test(rng: Random) -> tuple[str, str]:
    (_, name, sign), a, b = rng.choice(OPERATIONS), rng.randint(1, 9), rng.randint(1, 9)
    expected = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return (
        f"Write a Python test for {name}(a, b) with a = {a} and b = {b}.",
        f"def test_{name}():\n    # {a} {sign} {b} = {expected}\n    assert {name}({a}, {b}) == {expected}",
    )


def _dictionary(rng: Random) -> tuple[str, str]:
    (one, many), key, number = rng.choice(GOODS), rng.choice(COLUMNS), rng.randint(2, 9)
    return rng.choice(
        (
            (f"Python: build a dictionary that counts the {many} by {key}.",
             f'counts = {{}}\nfor {one} in {many}:\n    key = {one}["{key}"]\n'
             "    counts[key] = counts.get(key, 0) + 1"),
            (f"Python: sort the {many} by {key} and keep the first {number}.",
             f'result = sorted({many}, key=lambda {one}: {one}["{key}"])[:{number}]'),
            (f"Python: group the {many} by {key}.",
             f"from collections import defaultdict\n\ngroups = defaultdict(list)\nfor {one} in {many}:\n"
             f'    groups[{one}["{key}"]].append({one})'),
        )
    )  # fmt: skip


def _read_file(rng: Random) -> tuple[str, str]:
    extension, folder, word = rng.choice(EXTENSIONS), rng.choice(FOLDERS), rng.choice(WORDS)
    source = rng.choice(LIST_NAMES)
    return (
        rng.choice((f"Python: read {folder}/{source}.{extension} and print the lines that contain {word}.",
                    f"How do I print all lines with {word} from {folder}/{source}.{extension} in Python?")),
        f'# print the lines that contain {word}\nwith open("{folder}/{source}.{extension}") as file:\n'
        f'    for line in file:\n        if "{word}" in line:\n            print(line.strip())',
    )  # fmt: skip


TASKS = (
    _aggregate, _mapping, _string, _sql_select, _sql_group, _sql_change, _shell, _dataclass, _class_method, _fix,
    _explain, _unit_test, _dictionary, _read_file,
)  # fmt: skip
