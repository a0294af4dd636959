"""What Prometheus reads at /metrics: counters, histograms and gauges of one server.

Labels are names of routes, statuses and reasons, never a key, a prompt or anything else that a
client sent.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flashdraft.serve.usage import Usage

__all__ = ["Metrics"]

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """A registry of its own: two servers of one process, as in tests, do not share figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Answers by route and status", "route", "status")
        self.cancelled = self._counter("cancelled_requests", "Ended before their end", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, as in usage")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens not read again")
        self.completion_tokens = self._counter("completion_tokens", "New tokens, as in usage")
        self.drafted = self._counter("drafted_tokens", "Tokens that the drafter proposed")
        self.accepted = self._counter("accepted_tokens", "Those that the target accepted")
        self.faults = self._counter("engine_faults", "Engines that failed and were replaced")
        self.lost_lines = self._gauge("lost_log_lines", "Lines that no log took")

        first = "From a request to its first token"
        each = "Each token behind the first"
        whole = "From a request to its last token"
        self.first_token = self._histogram("time_to_first_token_seconds", first, _FIRST)
        self.token = self._histogram("time_per_output_token_seconds", each, _EACH)
        self.request = self._histogram("request_seconds", whole, _WHOLE)

        self.running = self._gauge("running_requests", "Requests that have a row")
        self.waiting = self._gauge("waiting_requests", "Requests that wait for a row")
        self.cache_tokens = self._gauge("cache_tokens", "Tokens whose keys and values are kept")
        self.ready = self._gauge("ready", "1 where requests are taken")

    def count(self, usage: Usage) -> None:
        """One finished call, by what its client is told."""
        self.prompt_tokens.inc(usage.num_prompt)
        self.cached_tokens.inc(usage.num_cached)
        self.completion_tokens.inc(usage.num_new)
        self.accepted.inc(usage.num_accepted)
        self.drafted.inc(usage.num_drafted)

    def page(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flashdraft_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"flashdraft_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"flashdraft_{name}", text, buckets=buckets, registry=self.registry)
