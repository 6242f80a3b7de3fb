"""Suite "standard": tasks that lm-evaluation-harness asks and scores itself, its scores as samples beside ours.

The prompts are the harness's (no templates, as it asks any model), options are compared by their log-likelihoods. What
is ours are the rows, the draw of the items, going on where an evaluation was, intervals and tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import Benchmark, Item, Sample, Score
from ultrafuser_mega.evaluation.benchmarks.agieval import Aqua, SatMath
from ultrafuser_mega.evaluation.benchmarks.files import source_file
from ultrafuser_mega.evaluation.benchmarks.gsm8k import Gsm8k
from ultrafuser_mega.evaluation.benchmarks.truthfulqa import TruthfulQa
from ultrafuser_mega.evaluation.harness.run import NOT_INSTALLED, write_tasks

_AT_ONCE = 256  # items, behind which an interrupted evaluation goes on


class HarnessBenchmark(Benchmark):
    """A task of the harness.

    Attributes:
        task: its name there.
        value: which of an item's metrics is its score.
        answers: which of the task's filters found the answer; "none": it has none.
    """

    task: ClassVar[str]
    value: ClassVar[str] = "acc"
    answers: ClassVar[str] = "none"
    metric = "accuracy"

    def items(self, data: Path) -> list[Item]:
        """An item's context is its only turn; ``reference`` says which document of the task it is."""
        source_file(self, data)
        if find_spec("lm_eval") is None:
            raise InputError(f"{self.name}: {NOT_INSTALLED}")
        with _manager(data) as manager:
            task = manager.load([self.task])["tasks"][self.task]
            contexts = [str(task.doc_to_text(doc)) for doc in task.eval_docs]
        return [Item(f"{self.name}/{n}", (text,), {"data": str(data), "doc": n}) for n, text in enumerate(contexts)]

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        """Not asked for: the harness scores."""
        raise NotImplementedError(f"{self.name}: {self.task} is scored by lm-evaluation-harness")

    def samples(self, model: str, asked: Any, items: Sequence[Item]) -> Iterator[Sample]:
        """What the harness finds.

        Args:
            model: name of the row.
            asked: the harness's model class over it.
            items: to ask.
        """
        from lm_eval import simple_evaluate

        for first in range(0, len(items), _AT_ONCE):
            part = items[first : first + _AT_ONCE]
            numbers = {item.reference["doc"]: item for item in part}
            with _manager(Path(part[0].reference["data"])) as manager:
                found = simple_evaluate(
                    asked,
                    tasks=[self.task],
                    samples={self.task: list(numbers)},
                    task_manager=manager,
                    bootstrap_iters=0,
                    verbosity="ERROR",
                )
            rows = [row for row in found["samples"][self.task] if row.get("filter", "none") == self.answers]
            yield from (self._sample(model, numbers[row["doc_id"]], row) for row in rows)

    def _sample(self, model: str, item: Item, row: dict[str, Any]) -> Sample:
        first = row["resps"][0][0]
        generated = isinstance(first, str)
        replies = (first,) if generated else tuple(f"{resp[0][0]:.4f}" for resp in row["resps"])
        return Sample(
            model=model,
            benchmark=self.name,
            item=item.id,
            group=item.id,
            category="",
            turns=item.turns,
            replies=replies,
            score=float(row[self.value]),
            extracted=str(row["filtered_resps"][0]) if generated else replies[0],
            rule=f"lm-evaluation-harness: {self.value}" + ("" if self.answers == "none" else f", {self.answers}"),
            tokens=0,
            finish=(),
        )


class StandardTruthfulQaMc1(HarnessBenchmark):
    """Whether the best answer is the likeliest."""

    name, title, task = "standard_truthfulqa_mc1", "TruthfulQA MC1", "ultrafuser_truthfulqa_mc1"
    domain, source, origin = TruthfulQa.domain, TruthfulQa.source, TruthfulQa.origin


class StandardTruthfulQaMc2(HarnessBenchmark):
    """The right answers' share of the probability of all."""

    name, title, task = "standard_truthfulqa_mc2", "TruthfulQA MC2", "ultrafuser_truthfulqa_mc2"
    domain, source, origin = TruthfulQa.domain, TruthfulQa.source, TruthfulQa.origin
    metric = "share of probability"


class StandardGsm8k(HarnessBenchmark):
    """The last number of an answer."""

    name, title, task = "standard_gsm8k", "GSM8K (harness)", "ultrafuser_gsm8k"
    domain, source, origin = Gsm8k.domain, Gsm8k.source, Gsm8k.origin
    value, answers, metric = "exact_match", "flexible-extract", "exact match"


class StandardSatMath(HarnessBenchmark):
    """The likeliest letter."""

    name, title, task = "standard_sat_math", "SAT-Math (harness)", "ultrafuser_sat_math"
    domain, source, origin = SatMath.domain, SatMath.source, SatMath.origin


class StandardAqua(HarnessBenchmark):
    """The likeliest letter."""

    name, title, task = "standard_aqua", "AQuA (harness)", "ultrafuser_aqua"
    domain, source, origin = Aqua.domain, Aqua.source, Aqua.origin


STANDARD = (StandardTruthfulQaMc1, StandardTruthfulQaMc2, StandardGsm8k, StandardSatMath, StandardAqua)


@contextmanager
def _manager(data: Path) -> Iterator[Any]:
    """The harness's task manager, which knows our tasks on the files of ``data``, as long as the context lasts."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    with TemporaryDirectory(prefix="ultrafuser-tasks-") as folder:
        write_tasks(data, Path(folder))
        yield TaskManager(include_path=folder, include_defaults=False)  # theirs take seconds to list
