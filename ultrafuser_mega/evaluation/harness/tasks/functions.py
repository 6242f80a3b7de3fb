"""What the tasks beside this file do with their rows; lm-eval loads it by path, so it imports nothing of ours."""

from typing import Any


def truthfulqa_docs(dataset: Any) -> Any:
    """Columns of the published CSV -> choices, the right ones first, as the hub's copy has them."""

    def choices(row: dict[str, str]) -> dict[str, Any]:
        right = [text.strip() for text in row["Correct Answers"].split(";") if text.strip()]
        wrong = [text.strip() for text in row["Incorrect Answers"].split(";") if text.strip()]
        return {
            "question": row["Question"].strip(),
            "mc1_choices": [row["Best Answer"].strip(), *wrong],
            "mc2_choices": [*right, *wrong],
            "right": len(right),
        }

    return dataset.map(choices)


def truthfulqa_mc2(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The share of probability that the right answers have."""
    from math import exp

    likelihoods = [likelihood for likelihood, _ in results]
    most = max(likelihoods)
    weights = [exp(likelihood - most) for likelihood in likelihoods]
    return {"acc": sum(weights[: doc["right"]]) / sum(weights)}


def agieval_docs(dataset: Any) -> Any:
    """The label's place among the options' letters."""

    def gold(row: dict[str, Any]) -> dict[str, Any]:
        letters = [f"({option[1]})" for option in row["options"]]
        return {"letters": letters, "gold": letters.index(f"({row['label']})")}

    return dataset.map(gold)
