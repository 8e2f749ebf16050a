"""What Prometheus is told: the names are vLLM's, so that its dashboards need another prefix and no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pronghorn.engine.engine import Stats

if TYPE_CHECKING:
    from pronghorn.generation import Chunk
    from pronghorn.serve.app import Served

SECONDS = (*(x * 10**e for e in range(-3, 2) for x in (1, 2, 5)), 100, 200, 500)
SHORT = (0.0005, *SECONDS[:12])

Rows = dict[str, tuple[str, Callable[[Stats], float]]]

GAUGES: Rows = {
    "num_requests_running": ("Samples that hold pages of the KV cache.", lambda s: s.running),
    "num_requests_waiting": ("Samples in the queue.", lambda s: s.waiting),
    "kv_cache_usage_perc": ("Part of the KV cache's pages that is held, 0 to 1.", lambda s: s.held_pages / s.pages),
}
COUNTERS: Rows = {
    "prompt_tokens": ("Tokens of the prompts that were begun.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generated_tokens),
    "prefix_cache_queries": ("Tokens that the prefix cache was asked for.", lambda s: s.prompt_tokens),
    "prefix_cache_hits": ("Tokens that it had.", lambda s: s.cached_tokens),
    "num_preemptions": ("Samples that gave up their pages for others.", lambda s: s.preemptions),
    "spec_decode_num_draft_tokens": ("Tokens that a draft proposed.", lambda s: s.drafted_tokens),
    "spec_decode_num_accepted_tokens": ("Of these, those that were right.", lambda s: s.accepted_tokens),
    "engine_steps": ("Steps of the engine.", lambda s: s.steps),
}


class Metrics:
    """Counts and times, by model; what engines count themselves is asked of them when it is wanted."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models = models
        self.registry = CollectorRegistry()
        self.ttft = self._histogram("time_to_first_token_seconds", "From a request's coming.", SECONDS)
        self.gap = self._histogram("inter_token_latency_seconds", "From token to token, where they are sent.", SHORT)
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request's coming to its end.", SECONDS)
        name, text = "pronghorn:request_success", "Samples that ended, by their finish_reason."
        self.ended = Counter(name, text, ["model_name", "finished_reason"], registry=self.registry)
        name, text = "pronghorn:http_requests", "HTTP requests, by the status of the answer (499: the client left)."
        self.http = Counter(name, text, ["route", "status"], registry=self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"pronghorn:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for."""
        stats: dict[str, Stats] = {name: served.engine.stats() for name, served in dict(self.models).items()}
        for kind, rows in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, (text, value) in rows.items():
                family = kind(f"pronghorn:{name}", text, labels=["model_name"])
                for model, of in stats.items():
                    family.add_metric([model], value(of))
                yield family

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self.registry)


class Meter:
    """One request's times. `started`: when it came, by time.perf_counter()."""

    def __init__(self, metrics: Metrics, model: str, started: float) -> None:
        self.started = started
        self.last: dict[int, float] = {}  # by sample
        self.ttft, self.gap = metrics.ttft.labels(model), metrics.gap.labels(model)
        self.whole, self.ended = metrics.whole.labels(model), metrics.ended
        self.model = model

    def saw(self, chunk: Chunk) -> None:
        """A chunk has come."""
        now, n_tokens = time.perf_counter(), len(chunk.token_ids)
        if n_tokens and chunk.sample in self.last:
            for _ in range(n_tokens):
                self.gap.observe((now - self.last[chunk.sample]) / n_tokens)
        elif n_tokens:
            self.ttft.observe(now - self.started)
        if n_tokens:
            self.last[chunk.sample] = now
        if chunk.finish_reason:
            self.end(chunk.finish_reason)

    def end(self, finish_reason: str) -> None:
        """A sample has ended."""
        self.whole.observe(time.perf_counter() - self.started)
        self.ended.labels(self.model, finish_reason).inc()
