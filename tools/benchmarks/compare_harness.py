"""Our model class in lm-evaluation-harness beside the harness's own ``hf`` class: the same scores, and how fast.

    python tools/benchmarks/compare_harness.py MODEL_FOLDER --data BENCHMARKS --limit 100 --out harness.json

Both classes are loaded with the same weights in float32 and asked the same items of the same tasks, in turn, each
task by itself; with --peers vllm the harness's vLLM class as well, where it is installed. What is compared are the
log-likelihood of every option and the text of every answer; speed is items per second of the class alone, without
building requests, by the clock and by the processor time of this process: on a machine that others use as well the
latter counts (a vLLM that shares it needs VLLM_ENABLE_V1_MULTIPROCESSING=0). With --float64 the ``hf`` class computes
once more in float64, and every other one's distance from that is told: what float32 costs this model at all. With
--fused a release of n specialists of the model's size is asked as well: what one specialist costs in it, in parts of
the model alone.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_mixture_ce import cpu_model
from scripting import Parser, positive, write_json

from ultrafuser_mega.evaluation.harness.run import write_tasks

TASKS = "ultrafuser_truthfulqa_mc1,ultrafuser_truthfulqa_mc2,ultrafuser_aqua,ultrafuser_sat_math,ultrafuser_gsm8k"
_ASKED = ("loglikelihood", "generate_until")
_EXACT = "hf float64"
_FUSED = "fused"
_SECONDS = {"seconds": "ours_faster", "cpu_seconds": "ours_faster_by_cpu"}


class Timed:
    """What a model's answers took."""

    def __init__(self, model: Any) -> None:
        self.model, self.seconds, self.cpu_seconds = model, 0.0, 0.0
        for name in _ASKED:
            setattr(model, name, self._timed(getattr(model, name)))

    def _timed(self, answer: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            began, cpu_began = time.perf_counter(), time.process_time()
            try:
                return answer(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began
                self.cpu_seconds += time.process_time() - cpu_began

        return timed


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--ours", help="what our class opens; default: the folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=positive, default=100, help="items of each task")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--peers", default="hf", help="hf, vllm; empty: none")
    parser.add_argument("--fused", help="a release of several specialists of this size")
    parser.add_argument("--float64", action="store_true", help="every class beside hf in float64")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for name in filter(None, (str(options.model), options.fused)):
        if not Path(name).is_dir():
            parser.error(f"{name}: no such folder")
    models = {"ultrafuser": Timed(ours(options.ours or str(options.model), options))} | {
        peer: Timed(theirs(peer, options)) for peer in filter(None, options.peers.split(","))
    }
    if options.fused:
        models[_FUSED] = Timed(ours(options.fused, options))
    if options.float64:
        models[_EXACT] = Timed(theirs("hf", options, "float64"))
    report: dict[str, Any] = {
        "machine": cpu_model(),
        "limit": options.limit,
        "batch_size": options.batch_size,
        "tasks": {},
    }
    with TemporaryDirectory() as folder:
        write_tasks(options.data, Path(folder))
        manager = TaskManager(include_path=folder)
        for task in options.tasks.split(","):
            found, entry = {}, {}
            for name, timed in models.items():
                timed.seconds = timed.cpu_seconds = 0.0
                result = simple_evaluate(
                    timed.model,
                    tasks=[task],
                    limit=options.limit,
                    task_manager=manager,
                    log_samples=True,
                    bootstrap_iters=0,
                )
                samples = sorted(
                    result["samples"][task], key=lambda sample: (sample["doc_id"], sample.get("filter", ""))
                )
                found[name] = samples
                scores = {
                    k: v for k, v in result["results"][task].items() if isinstance(v, float) and "stderr" not in k
                }
                entry[name] = {
                    "scores": scores,
                    "seconds": timed.seconds,
                    "cpu_seconds": timed.cpu_seconds,
                    "items_per_second": options.limit / timed.seconds,
                }
            for peer in list(models)[1:]:
                entry[peer] |= agreement(found["ultrafuser"], found[peer])
                for unit, name in _SECONDS.items():
                    entry[peer][name] = entry[peer][unit] / entry["ultrafuser"][unit]
            if options.fused:
                specialists = len(models[_FUSED].model.get_model_info()["model_specialists"])
                entry[_FUSED]["of_a_specialist"] = {
                    unit: entry[_FUSED][unit] / specialists / entry["ultrafuser"][unit] for unit in _SECONDS
                }
            if options.float64:
                for name in found.keys() - {_EXACT}:
                    entry[name]["from_float64"] = agreement(found[name], found[_EXACT])["largest_difference"]
            report["tasks"][task] = entry
            print(task, entry, flush=True)
    if options.out:
        write_json(options.out, report)


def ours(model: str, options: Any) -> Any:
    """Our class."""
    from ultrafuser_mega.evaluation.harness.model import UltraFuserLM

    return UltraFuserLM(model, dtype="fp32", batch_size=options.batch_size)


def theirs(peer: str, options: Any, dtype: str = "float32") -> Any:
    """One of the harness's own."""
    from lm_eval.api.registry import get_model

    settings: dict[str, Any] = {"pretrained": str(options.model), "dtype": dtype, "batch_size": options.batch_size}
    if peer == "hf":
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return get_model(peer)(**settings)


def agreement(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest difference of a log-likelihood, and how many texts are the same."""
    largest, same, texts = 0.0, 0, 0
    for a, b in zip(mine, other, strict=True):
        assert a["doc_id"] == b["doc_id"]
        for one, two in zip(a["resps"], b["resps"], strict=True):
            if isinstance(one[0], str):
                texts += 1
                same += one[0] == two[0]
            else:
                apart = abs(float(one[0][0]) - float(two[0][0]))
                largest = max(largest, math.inf if math.isnan(apart) else apart)  # max() would pass a NaN over
    return {"largest_difference": largest, "same_texts": same, "texts": texts}


if __name__ == "__main__":
    main()
