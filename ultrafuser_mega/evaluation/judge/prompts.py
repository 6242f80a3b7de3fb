"""What judges are asked, word for word as published.

RANK: AlpacaEval's ``alpaca_eval_gpt4`` (Li et al. 2023; Apache-2.0). GRADE: FastChat's ``single-v1``, ``single-math-v1``
and their multi-turn forms (Zheng et al. 2023; Apache-2.0). SELECT: UltraFuser's table 11, for any number of responses.
"""

from __future__ import annotations

# ruff: noqa: E501

RANK_SYSTEM = "You are a helpful assistant, that ranks models by the quality of their answers."

RANK = '''I want you to create a leaderboard of different of large-language models. To do so, I will give you the instructions (prompts) given to the models, and the responses of two models. Please rank the models based on which responses would be preferred by humans. All inputs and outputs should be python dictionaries.

Here is the prompt:
{{
    "instruction": """{instruction}""",
}}

Here are the outputs of the models:
[
    {{
        "model": "model_1",
        "answer": """{output_1}"""
    }},
    {{
        "model": "model_2",
        "answer": """{output_2}"""
    }}
]

Now please rank the models by the quality of their answers, so that the model with rank 1 has the best output. Then return a list of the model names and ranks, i.e., produce the following output:
[
    {{'model': <model-name>, 'rank': <model-rank>}},
    {{'model': <model-name>, 'rank': <model-rank>}}
]

Your response must be a valid Python dictionary and should contain nothing else because we will directly execute it in Python. Please provide the ranking that the majority of humans would give.'''

_FORMAT = 'Begin your evaluation by {begin} Be as objective as possible. After providing your explanation, you must rate the response on a scale of 1 to 10 by strictly following this format: "[[rating]]", for example: "Rating: [[5]]".'
_GENERAL = "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and level of detail of the response."
_MATH = "Your evaluation should consider correctness and helpfulness. You will be given a reference answer and the assistant's answer."
_BEGIN_GENERAL = _FORMAT.format(begin="providing a short explanation.")
_BEGIN_MATH = _FORMAT.format(
    begin="comparing the assistant's answer with the reference answer. Identify and correct any mistakes."
)
_ACT = "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant to the user question"

_ANSWER = "\n\n[The Start of Assistant's Answer]\n{answer_1}\n[The End of Assistant's Answer]"
_CONVERSATION = "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{question_1}\n\n### Assistant A:\n{answer_1}\n\n### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n<|The End of Assistant A's Conversation with User|>"
_REFERENCES = "<|The Start of Reference Answer|>\n\n### User:\n{question_1}\n\n### Reference answer:\n{reference_1}\n\n### User:\n{question_2}\n\n### Reference answer:\n{reference_2}\n\n<|The End of Reference Answer|>\n\n\n"

#: (turn, with a reference) -> (system, user).
GRADE: dict[tuple[int, bool], tuple[str, str]] = {
    (1, False): (
        "You are a helpful assistant.",
        f"[Instruction]\n{_ACT} displayed below. {_GENERAL} {_BEGIN_GENERAL}\n\n[Question]\n{{question_1}}{_ANSWER}",
    ),
    (1, True): (
        "You are a helpful assistant.",
        f"[Instruction]\n{_ACT} displayed below. {_MATH} {_BEGIN_MATH}\n\n[Question]\n{{question_1}}"
        f"\n\n[The Start of Reference Answer]\n{{reference_1}}\n[The End of Reference Answer]{_ANSWER}",
    ),
    (2, False): (
        f"{_ACT} displayed below. {_GENERAL} You evaluation should focus on the assistant's answer to the second user question. {_BEGIN_GENERAL}\n\n",
        _CONVERSATION,
    ),
    (2, True): (
        f"{_ACT}. {_MATH} You evaluation should focus on the assistant's answer to the second question. {_BEGIN_MATH}\n\n",
        _REFERENCES + _CONVERSATION,
    ),
}

SELECT_BEGIN = "You are a helpful assistant in selecting the best response set for the instruction below. The best response is the most helpful, honest, and harmless one."
SELECT_TURNS = " Note that there are {turns} consecutive instructions and one response for each."
