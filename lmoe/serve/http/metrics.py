"""What Prometheus is told: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from lmoe.serve.answer import Answer
from lmoe.serve.request import EngineState

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the buckets of times."""


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter("lmoe_requests", "Requests by route and status", ["route", "status"], registry=own)
        self.gone = Counter("lmoe_clients_gone", "Requests whose client went away", registry=own)
        self.prompt_tokens = Counter("lmoe_prompt_tokens", "Tokens of prompts", registry=own)
        self.generated_tokens = Counter("lmoe_generated_tokens", "Tokens of answers", registry=own)
        self.by_expert = Counter("lmoe_expert_requests", "Answers that weigh an expert", ["expert"], registry=own)
        self.first_token = _histogram("time_to_first_token", "From submitting an answer to its first token", own)
        self.per_token = _histogram("time_per_token", "Mean of the tokens of an answer after the first", own)
        self.queue = _histogram("queue_time", "Until an answer has a row in the batch", own)
        self.whole = _histogram("request_time", "From the first byte of a request to the last of its response", own)
        self.running = Gauge("lmoe_running", "Answers with a row in the batch", registry=own)
        self.waiting = Gauge("lmoe_waiting", "Answers that wait for a row", registry=own)
        self.cached = Gauge("lmoe_cached_tokens", "Tokens in the KV cache", registry=own)
        self.capacity = Gauge("lmoe_cache_capacity_tokens", "Tokens that the KV cache holds at most", registry=own)

    def answered(self, answer: Answer) -> None:
        """Count an answer that is over, whole or not."""
        self.generated_tokens.inc(answer.generated)
        for name, weight in (answer.request.mixture or {}).items():
            if weight:
                self.by_expert.labels(name).inc()
        if (waited := answer.running.waited) is not None:
            self.queue.observe(waited)
        if answer.first is not None and answer.last is not None:
            self.first_token.observe(answer.first - answer.submitted)
            if answer.generated > 1:
                self.per_token.observe((answer.last - answer.first) / (answer.generated - 1))

    def exposition(self, state: EngineState) -> bytes:
        """All of it as text, with what the engine does at the moment."""
        self.running.set(state.running)
        self.waiting.set(state.waiting)
        self.cached.set(state.cached_tokens)
        self.capacity.set(state.cache_capacity)
        return generate_latest(self.registry)


def _histogram(name: str, about: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"lmoe_{name}_seconds", about, buckets=SECONDS, registry=registry)
