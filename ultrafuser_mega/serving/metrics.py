"""Numbers for Prometheus, under vLLM's names behind another prefix, so that dashboards made for it need one change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ultrafuser_mega.inference.requests import EngineStats

PREFIX = "ultrafuser:"
_MODEL, _SPECIALIST = "model_name", "specialist"
# vLLM's steps.
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """The numbers of one server.

    Args:
        model: its name, a label of every number.
        specialists: in the order of gate weights.
    """

    def __init__(self, model: str, specialists: Sequence[str]) -> None:
        self._registry = CollectorRegistry()
        self._model, self._specialists = model, list(specialists)
        self._stats: EngineStats | None = None
        self._weights = [0.0] * len(self._specialists)
        self._tokens = 0

        def counted(name: str, what: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, what, (_MODEL, *labels), registry=self._registry)

        def timed(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            histogram = Histogram(PREFIX + name, what, (_MODEL,), buckets=buckets, registry=self._registry)
            return histogram.labels(model)

        self._success = counted("request_success", "Answers that came to their end.", "finished_reason")
        self._responses = counted("http_responses", "Responses by route and status.", "route", "status")
        self._first = timed("time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        self._between = timed("inter_token_latency_seconds", "Between two tokens of an answer.", _BETWEEN)
        self._whole = timed("e2e_request_latency_seconds", "From a request to its last token.", _WHOLE)
        self._prompt = timed("request_prompt_tokens", "Tokens of prompts, the first specialist's.", _TOKENS)
        self._generated = timed("request_generation_tokens", "Tokens of answers.", _TOKENS)
        self._registry.register(_EngineNumbers(self))

    def token(self, weights: Sequence[float], since: float, *, first: bool) -> None:
        """An answer got a token, so many seconds after the one before it, or after the request."""
        (self._first if first else self._between).observe(since)
        self._tokens += 1
        for place, weight in enumerate(weights):
            self._weights[place] += weight

    def answer(self, reason: str, prompt: int, generated: int, seconds: float) -> None:
        """An answer came to its end, for "stop", "length", "abort" or "error"."""
        self._success.labels(self._model, reason).inc()
        self._prompt.observe(prompt)
        self._generated.observe(generated)
        self._whole.observe(seconds)

    def response(self, route: str, status: int) -> None:
        """A request was answered."""
        self._responses.labels(self._model, route, str(status)).inc()

    def text(self, stats: EngineStats) -> bytes:
        """What Prometheus reads."""
        self._stats = stats
        return generate_latest(self._registry)

    def engine_numbers(self) -> Iterable[Metric]:
        """What is read off the engine."""
        stats = self._stats
        if stats is None:
            return
        yield self._gauge("num_requests_running", "Answers that have caches.", stats.running)
        yield self._gauge("num_requests_waiting", "Answers that wait for room.", stats.waiting)
        used = {name: 1 - stats.free[name] / max(total, 1) for name, total in stats.total.items()}
        yield self._of_specialists(
            GaugeMetricFamily, "kv_cache_usage_perc", "Part of the cache in use, 1 is full.", used
        )
        counts = {
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "prefix_cache_queries": ("Tokens of prompts that were looked for in the cache.", stats.prompt_tokens),
            "prefix_cache_hits": ("Those of them that were there.", stats.prefix_hits),
            "forward_passes": ("Forward passes.", stats.passes),
        }
        for name, (what, values) in counts.items():
            yield self._of_specialists(CounterMetricFamily, name, what, values)
        yield self._counter("generation_tokens", "Tokens of answers.", stats.tokens)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens that a specialist drafted.", stats.drafted)
        yield self._counter("spec_decode_num_accepted_tokens", "Those of them that were kept.", stats.accepted)
        sums = dict(zip(self._specialists, self._weights, strict=True))
        yield self._of_specialists(CounterMetricFamily, "gate_weight", "Sum of gate weights over tokens.", sums)
        means = {name: total / self._tokens for name, total in sums.items() if self._tokens}
        yield self._of_specialists(GaugeMetricFamily, "gate_weight_mean", "Mean gate weight of all tokens.", means)

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, what, labels=(_MODEL,))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, what, labels=(_MODEL,))
        family.add_metric((self._model,), value)
        return family

    def _of_specialists(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        what: str,
        values: Mapping[str, float],
    ) -> Metric:
        family = kind(PREFIX + name, what, labels=(_MODEL, _SPECIALIST))
        for specialist, value in values.items():
            family.add_metric((self._model, specialist), value)
        return family


class _EngineNumbers(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.engine_numbers()

    def describe(self) -> Iterable[Metric]:
        return []
