"""The `math` class of the toy data: word problems and arithmetic, each with worked steps and an answer.

The responses are sentences around calculations. A specialist for text can follow the sentences and
one for code the operators, but neither has learned to carry the numbers from line to line.
"""

from __future__ import annotations

from random import Random

from ultrafuser_mega.toy.words import GOODS, NAMES, WEEKDAYS, two

SHAPES = ("garden", "room", "field", "table", "wall", "yard")
VEHICLES = ("train", "car", "bus", "bicycle", "boat", "truck")
CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("shelf", "shelves"), ("crate", "crates"))
# larger unit, plural, smaller unit plural, factor
UNITS = (
    ("hour", "hours", "minutes", 60), ("minute", "minutes", "seconds", 60), ("week", "weeks", "days", 7),
    ("day", "days", "hours", 24), ("meter", "meters", "centimeters", 100), ("year", "years", "months", 12),
    ("dollar", "dollars", "cents", 100), ("kilogram", "kilograms", "grams", 1000),
)  # fmt: skip
FRACTIONS = (("half", 2), ("a third", 3), ("a quarter", 4), ("a fifth", 5), ("a tenth", 10))


def _buy(rng: Random) -> tuple[str, str]:
    name, (one, many) = rng.choice(NAMES), rng.choice(GOODS)
    count, price, paid = rng.randint(2, 9), rng.randint(2, 9), rng.choice((0, 100))
    total = count * price
    instruction = f"{name} buys {count} {many}. Each {one} costs {price} dollars. "
    steps = f"Each {one} costs {price} dollars, so {count} {many} cost {count} * {price} = {total} dollars."
    if not paid:
        return instruction + f"How much does {name} pay?", f"{steps}\nThe answer is {total}."
    return (
        instruction + f"{name} pays with a {paid} dollar note. How much change is there?",
        f"{steps}\nThe change is {paid} - {total} = {paid - total} dollars.\nThe answer is {paid - total}.",
    )


def _give(rng: Random) -> tuple[str, str]:
    (name, other), (_, many) = two(rng, NAMES), rng.choice(GOODS)
    start, given, found = rng.randint(10, 30), rng.randint(2, 9), rng.randint(2, 9)
    left = start - given
    instruction = f"{name} has {start} {many} and gives {given} of them to {other}. "
    steps = f"After giving {given} {many} to {other}, {name} has {start} - {given} = {left} {many}."
    if rng.random() < 0.5:
        return instruction + f"How many {many} are left?", f"{steps}\nThe answer is {left}."
    return (
        instruction + f"Then {name} finds {found} more. How many {many} does {name} have now?",
        f"{steps}\nWith {found} more there are {left} + {found} = {left + found} {many}.\n"
        f"The answer is {left + found}.",
    )


def _share(rng: Random) -> tuple[str, str]:
    (_, many), (box, boxes) = rng.choice(GOODS), rng.choice(CONTAINERS)
    parts, each = rng.randint(2, 9), rng.randint(2, 9)
    total = parts * each
    return rng.choice(
        (
            (f"{total} {many} are packed equally into {parts} {boxes}. How many {many} are in each {box}?",
             f"We divide the {many} by the {boxes}: {total} / {parts} = {each}.\nThe answer is {each}."),
            (f"There are {parts} {boxes} with {each} {many} in each {box}. How many {many} are there in all?",
             f"We multiply the {boxes} by the {many}: {parts} * {each} = {total}.\nThe answer is {total}."),
        )
    )  # fmt: skip


def _distance(rng: Random) -> tuple[str, str]:
    vehicle, speed, hours = rng.choice(VEHICLES), 10 * rng.randint(2, 9), rng.randint(2, 9)
    way = speed * hours
    return rng.choice(
        (
            (f"A {vehicle} travels at {speed} kilometers per hour. How far does it go in {hours} hours?",
             f"Distance is speed times time: {speed} * {hours} = {way} kilometers.\nThe answer is {way}."),
            (f"A {vehicle} travels {way} kilometers in {hours} hours. What is its speed?",
             f"Speed is distance divided by time: {way} / {hours} = {speed} kilometers per hour.\n"
             f"The answer is {speed}."),
        )
    )  # fmt: skip


def _rectangle(rng: Random) -> tuple[str, str]:
    shape, length, width = rng.choice(SHAPES), rng.randint(3, 12), rng.randint(2, 9)
    half = length + width
    given = f"A {shape} is {length} meters long and {width} meters wide. "
    if rng.random() < 0.5:
        area = length * width
        return given + "What is its area?", (
            f"Area is length times width: {length} * {width} = {area} square meters.\nThe answer is {area}."
        )
    return given + "What is its perimeter?", (
        f"Length plus width is {length} + {width} = {half} meters.\n"
        f"The perimeter is twice that: 2 * {half} = {2 * half} meters.\nThe answer is {2 * half}."
    )


def _equation(rng: Random) -> tuple[str, str]:
    letter, factor, x, offset = rng.choice("xyzn"), rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 20)
    right = factor * x + offset
    return (
        rng.choice((f"Solve for {letter}: {factor}{letter} + {offset} = {right}",
                    f"What is {letter} if {factor}{letter} + {offset} = {right}?")),
        f"Subtract {offset} from both sides: {factor}{letter} = {right} - {offset} = {factor * x}.\n"
        f"Divide both sides by {factor}: {letter} = {factor * x} / {factor} = {x}.\nThe answer is {x}.",
    )  # fmt: skip


def _column_sum(rng: Random) -> tuple[str, str]:
    a, b = rng.randint(11, 89), rng.randint(11, 89)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    total = 10 * tens + ones
    instruction = rng.choice((f"Calculate {a} + {b}.", f"What is {a} + {b}?", f"Find the sum of {a} and {b}."))
    return instruction, (
        f"Add the ones: {a % 10} + {b % 10} = {ones}.\nAdd the tens: {a // 10} + {b // 10} = {tens}.\n"
        f"Together: {10 * tens} + {ones} = {total}.\nThe answer is {total}."
    )


def _average(rng: Random) -> tuple[str, str]:
    name, mean, spread = rng.choice(NAMES), rng.randint(5, 15), rng.randint(1, 4)
    numbers = [mean - spread, mean, mean + spread]
    rng.shuffle(numbers)
    a, b, c = numbers
    return (
        rng.choice((f"Find the average of {a}, {b} and {c}.",
                    f"{name} scores {a}, {b} and {c} points in three games. What is the average?")),
        f"First add the numbers: {a} + {b} + {c} = {3 * mean}.\n"
        f"There are 3 numbers: {3 * mean} / 3 = {mean}.\nThe answer is {mean}.",
    )  # fmt: skip


def _percent(rng: Random) -> tuple[str, str]:
    percent, base, (one, _) = 10 * rng.randint(1, 9), 10 * rng.randint(2, 20), rng.choice(GOODS)
    tenth = base // 10
    part = tenth * percent // 10
    ten_percent = f"Ten percent of {base} is {base} / 10 = {tenth}."
    steps = f"{ten_percent}\nThen {percent} percent is {percent // 10} * {tenth} = {part}."
    if rng.random() < 0.5:
        return f"What is {percent} percent of {base}?", f"{steps}\nThe answer is {part}."
    return (
        f"The price of a {one} is {base} dollars. It falls by {percent} percent. What is the new price?",
        f"{steps}\nThe new price is {base} - {part} = {base - part} dollars.\nThe answer is {base - part}.",
    )


def _ages(rng: Random) -> tuple[str, str]:
    (young, old), age, gap, later = two(rng, NAMES), rng.randint(4, 20), rng.randint(2, 9), rng.randint(2, 9)
    return (
        f"{young} is {age} years old. {old} is {gap} years older. How old will {old} be in {later} years?",
        f"Today {old} is {age} + {gap} = {age + gap} years old.\n"
        f"In {later} years {old} will be {age + gap} + {later} = {age + gap + later}.\n"
        f"The answer is {age + gap + later}.",
    )


def _convert(rng: Random) -> tuple[str, str]:
    (one, many, small, factor), count = rng.choice(UNITS), rng.randint(2, 12)
    return (
        rng.choice((f"How many {small} are there in {count} {many}?", f"Convert {count} {many} to {small}.")),
        f"One {one} has {factor} {small}, so {count} {many} have {count} * {factor} = {count * factor} {small}.\n"
        f"The answer is {count * factor}.",
    )


def _fraction(rng: Random) -> tuple[str, str]:
    (words, parts), each, (_, many), name = (
        rng.choice(FRACTIONS),
        rng.randint(2, 12),
        rng.choice(GOODS),
        rng.choice(NAMES),
    )
    total = parts * each
    question, steps = f"{name} has {total} {many} and sells {words} of them. ", f"{total} / {parts} = {each}"
    if rng.random() < 0.5:
        return question + f"How many {many} are sold?", f"We find {words} of {total}: {steps}.\nThe answer is {each}."
    return question + f"How many {many} remain?", (
        f"We find {words} of {total}: {steps}.\nThere remain {total} - {each} = {total - each} {many}.\n"
        f"The answer is {total - each}."
    )


def _sequence(rng: Random) -> tuple[str, str]:
    first, step = rng.randint(1, 20), rng.randint(2, 9)
    terms = [first + i * step for i in range(4)]
    listed = ", ".join(map(str, terms))
    return (
        rng.choice((f"What comes next: {listed}, ...?", f"Find the next number in the sequence {listed}.")),
        f"Each number is {step} more than the one before.\n"
        f"The next number is {terms[-1]} + {step} = {terms[-1] + step}.\nThe answer is {terms[-1] + step}.",
    )


def _compare(rng: Random) -> tuple[str, str]:
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    left, right = a * b, c * d
    verdict = "is greater than" if left > right else "is less than" if left < right else "is equal to"
    return (
        f"Compare {a} * {b} and {c} * {d}.",
        f"First {a} * {b} = {left}.\nThen {c} * {d} = {right}.\nSo {a} * {b} {verdict} {c} * {d}.",
    )


def _week(rng: Random) -> tuple[str, str]:
    name, (_, many), (day1, day2) = rng.choice(NAMES), rng.choice(GOODS), two(rng, WEEKDAYS)
    a, b = rng.randint(3, 20), rng.randint(3, 20)
    high, low = max(a, b), min(a, b)
    given = f"{name} sold {a} {many} on {day1} and {b} {many} on {day2}. "
    if rng.random() < 0.5 or a == b:
        return (
            given + "How many is that in all?",
            f"In all {name} sold {a} + {b} = {a + b} {many}.\nThe answer is {a + b}.",
        )
    return given + "How many more were sold on the better day?", (
        f"The better day was {day1 if a > b else day2}.\nThe difference is {high} - {low} = {high - low} {many}.\n"
        f"The answer is {high - low}."
    )


TASKS = (
    _buy, _give, _share, _distance, _rectangle, _equation, _column_sum, _average, _percent, _ages, _convert, _fraction,
    _sequence, _compare, _week,
)  # fmt: skip
