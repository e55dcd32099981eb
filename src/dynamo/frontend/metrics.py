"""What does the frontend report about itself to Prometheus?

Names, labels and buckets are those of ai-dynamo 1.6.1 (`dynamo_frontend_*`). `docs/reference/metrics.md` lists them.
"""

from bisect import bisect_left
from collections.abc import Callable
from math import inf
from time import perf_counter

from dynamo.llm.output import TextDelta
from dynamo.llm.preprocessor import PreparationTimes
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime.buckets import buckets_from_env
from dynamo.runtime.instruments import Counter, Family, Gauge, Histogram
from dynamo.runtime.metrics import Metrics

Push = Callable[[EngineOutput], TextDelta]

UNKNOWN_MODEL = "unknown_model"  # label of requests for models that nobody serves: clients must not create series

STAGE_SECONDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0)
PREPROCESS_SECONDS = (0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5)
PREPARE_SECONDS = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5)
TOKENIZER_MS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
IMAGES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
DETOKENIZE_TIMED = 64  # one answer of so many is timed: a look at the clock for each token would cost a tenth of it
MODEL_FACTS = {
    "total_kv_blocks": "KV cache blocks of a worker that serves the model",
    "max_num_seqs": "Sequences that such a worker runs at once",
    "max_num_batched_tokens": "Tokens that such a worker computes in one step",
    "context_length": "Longest prompt and answer together, in tokens",
    "kv_cache_block_size": "Tokens of one KV cache block",
    "migration_limit": "Times a request may move to another worker",
}


class FrontendMetrics:
    """Every metric of the frontend process. Its only writer is the event loop's thread.

    Raises ValueError if a `DYN_METRICS_*` variable or the prefix is wrong.
    """

    def __init__(self, registry: Metrics, prefix: str = "dynamo_frontend") -> None:
        self._registry = registry
        self._prefix = prefix
        self._models: dict[str, ModelSeries] = {}
        self._workers: dict[tuple[int, int | None], tuple[Gauge, Gauge, Gauge]] = {}
        model = ("model",)
        request = ("model", "endpoint", "request_type")
        self.requests = self._counter("requests_total", "LLM requests answered", *request, "status", "error_type")
        self.started = self._counter("requests_started_total", "LLM requests accepted by a handler", *request)
        self.failures = self._counter("failures_total", "Answers with an error, by what went wrong", "class", "reason")
        self.active = self._gauge("active_requests", "Requests from handler entry to last byte", *model)
        self.inflight = self._gauge("inflight_requests", "Deprecated: the same as active_requests", *model)
        self.queued = self._gauge("queued_requests", "Deprecated: requests whose first token has not come", *model)
        self.disconnected = self._gauge("disconnected_clients", "Clients that left before their answer ended").labels()
        self.duration = self._histogram("request_duration_seconds", "Duration of LLM requests", "REQUEST_DURATION")
        self.ttft = self._histogram("time_to_first_token_seconds", "Time to first token", "TTFT")
        self.itl = self._histogram("inter_token_latency_seconds", "Time between two tokens of a choice", "ITL")
        self.input_tokens = self._histogram("input_sequence_tokens", "Tokens of a prompt", "INPUT_SEQUENCE")
        self.output_length = self._histogram("output_sequence_tokens", "Tokens of an answer", "OUTPUT_SEQUENCE")
        self.cached_tokens = self._histogram("cached_tokens", "Prompt tokens found in a prefix cache", "INPUT_SEQUENCE")
        self.output_tokens = self._counter("output_tokens_total", "Output tokens, counted as they come", *model)
        self.cache_hits = self._counter("tokenizer_cache_hits_total", "Prompts that began with known text").labels()
        self.cache_misses = self._counter("tokenizer_cache_misses_total", "Prompts that did not").labels()
        self.cache_known = self._counter("tokenizer_cache_cached_tokens_total", "Prompt tokens looked up", *model)
        self.cache_new = self._counter("tokenizer_cache_uncached_tokens_total", "Prompt tokens computed", *model)
        self.prefills = self._counter("remote_prefills_total", "Prompts sent to prefill workers, by outcome", "outcome")
        self.splits = self._counter(
            "prompt_splits_total", "Prompts by who was to compute them, and why", "model", "pool", "policy", "cause"
        )
        self.migrations = self._counter(
            "model_migration_total", "Requests that moved to another worker", "model", "migration_type", "outcome"
        )
        self.migration_seconds = self._fixed(
            "model_migration_duration_seconds", "From a worker's loss to another's first token", STAGE_SECONDS, *model
        )
        self.migrations_too_long = self._counter(
            "model_migration_max_seq_len_exceeded_total", "Requests too long to move", *model
        )
        self.images = self._fixed("images_per_request", "Images of a prompt", IMAGES, *model)
        self.model_ready = self._gauge("model_ready", "Whether a request for the model can be routed", *model)
        self.model_facts = {name: self._gauge(f"model_{name}", text, *model) for name, text in MODEL_FACTS.items()}
        worker = ("worker_id", "dp_rank", "worker_type")
        self.worker_ttft = self._gauge("worker_last_time_to_first_token_seconds", "Last time to first token", *worker)
        self.worker_isl = self._gauge("worker_last_input_sequence_tokens", "Tokens of the last prompt", *worker)
        self.worker_itl = self._gauge("worker_last_inter_token_latency_seconds", "Last mean inter-token time", *worker)
        stages = self._gauge("stage_requests", "Requests in a stage of the pipeline", "stage", "phase")
        self.preprocessing = stages.labels("preprocess", "")
        self.dispatched = stages.labels("dispatch", "aggregated")
        stage = self._fixed("stage_duration_seconds", "Duration of a stage of the pipeline", STAGE_SECONDS, "stage")
        text = TextTimes(registry, prefix)
        self.text = text
        self.preprocess_seconds, self.route_seconds = stage.labels("preprocess"), stage.labels("route")
        self.roundtrip_seconds = stage.labels("transport_roundtrip")

    def _counter(self, name: str, text: str, *labels: str) -> Family[Counter]:
        return self._registry.counter(name, text, labels, prefix=self._prefix, base=())

    def _gauge(self, name: str, text: str, *labels: str) -> Family[Gauge]:
        return self._registry.gauge(name, text, labels, prefix=self._prefix, base=())

    def _fixed(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Family[Histogram]:
        return self._registry.histogram(name, text, labels, bounds=bounds, prefix=self._prefix, base=())

    def _histogram(self, name: str, text: str, bucket_range: str) -> Family[Histogram]:
        return self._fixed(name, text, buckets_from_env(bucket_range), "model")

    def model(self, name: str) -> "ModelSeries":
        """The series of a model that is or was served; for any other ask for `UNKNOWN_MODEL`."""
        found = self._models.get(name)
        if found is None:
            found = self._models[name] = ModelSeries(self, name)
        return found

    def failure(self, failure_class: str, reason: str) -> None:
        """An error was answered."""
        self.failures.labels(failure_class, reason).value += 1

    def worker_answered(
        self, worker_id: int, dp_rank: int | None, prompt_tokens: int, ttft_s: float, itl_s: float
    ) -> None:
        """A worker finished a request; `itl_s` is the mean of the request, 0 if it made one token only."""
        gauges = self._workers.get((worker_id, dp_rank))
        if gauges is None:
            labels = (str(worker_id), "none" if dp_rank is None else str(dp_rank), "decode")
            gauges = (
                self.worker_ttft.labels(*labels),
                self.worker_isl.labels(*labels),
                self.worker_itl.labels(*labels),
            )
            self._workers[worker_id, dp_rank] = gauges
        gauges[0].value = ttft_s
        gauges[1].value = prompt_tokens
        if itl_s:
            gauges[2].value = itl_s

    def forget_worker(self, worker_id: int) -> None:
        """Drop the series of a worker that left."""
        for key in [key for key in self._workers if key[0] == worker_id]:
            del self._workers[key]
            rank = "none" if key[1] is None else str(key[1])
            pairs = (("worker_id", str(worker_id)), ("dp_rank", rank), ("worker_type", "decode"))
            for family in (self.worker_ttft, self.worker_isl, self.worker_itl):
                family.drop(pairs)

    def model_gone(self, name: str) -> None:
        """The last worker of a model left: it is not ready, and nothing is known of it."""
        self.model_ready.labels(name).value = 0
        for family in self.model_facts.values():
            family.drop((("model", name),))

    def update(self) -> None:
        """Bring up to date what is counted elsewhere. Called before each scrape."""
        tokens: float = 0
        for name, series in self._models.items():
            tokens += series.output_tokens.value
            images = self.images.labels(name)  # requests with images are refused in this version, so each has none
            images.counts[0] = series.input_tokens.count
        self.text.update(tokens)

    def render(self) -> bytes:
        """Everything that this process counts, as Prometheus text."""
        return self._registry.render()


class TextTimes:
    """What turning text into tokens and back costs (facts row O17), of all models."""

    def __init__(self, registry: Metrics, prefix: str) -> None:
        def histogram(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Family[Histogram]:
            return registry.histogram(name, text, labels, bounds=bounds, prefix=prefix, base=())

        self.times = PreparationTimes(
            histogram("template_seconds", "Rendering a chat template", PREPARE_SECONDS).labels(),
            histogram("tokenize_seconds", "Making tokens of a prompt", PREPARE_SECONDS).labels(),
        )
        latency = histogram("tokenizer_latency_ms", "The tokenizer's work", TOKENIZER_MS, "operation")
        self._tokenize_ms, self._detokenize_ms = latency.labels("tokenize"), latency.labels("detokenize")
        self._total_us = registry.counter(
            "detokenize_total_us", "Making text of all tokens, from one answer of 64", prefix=prefix, base=()
        ).labels()
        self._token_count = registry.counter(
            "detokenize_token_count", "Tokens that text was made of", prefix=prefix, base=()
        ).labels()
        self._until_timed = 1
        self._timed_s = 0.0
        self._timed_tokens = 0

    def maybe_timed(self, push: Push) -> Push:
        """The decoder's `push`, or for one answer of many one that looks at the clock."""
        self._until_timed -= 1
        if self._until_timed:
            return push
        self._until_timed = DETOKENIZE_TIMED

        def timed(output: EngineOutput) -> TextDelta:
            start = perf_counter()
            delta = push(output)
            elapsed_s = perf_counter() - start
            self._timed_s += elapsed_s
            self._timed_tokens += delta.token_count
            self._detokenize_ms.observe(elapsed_s * 1e3)
            return delta

        return timed

    def update(self, tokens: float) -> None:
        """Bring up to date what follows from the rest; `tokens` were made so far."""
        self._token_count.value = tokens
        if self._timed_tokens:
            self._total_us.value = max(self._total_us.value, tokens * self._timed_s / self._timed_tokens * 1e6)
        seconds, ms = self.times.tokenize, self._tokenize_ms
        ms.sum = seconds.sum * 1e3
        ms.counts[:] = [0] * len(ms.counts)
        for bound_s, count in zip((*seconds.bounds, inf), seconds.counts, strict=True):
            ms.counts[bisect_left(ms.bounds, bound_s * 1e3)] += count


class ModelSeries:
    """The series of one model, looked up once."""

    def __init__(self, metrics: FrontendMetrics, model: str) -> None:
        self.model = model
        self.metrics = metrics
        self.active = metrics.active.labels(model)
        self.inflight = metrics.inflight.labels(model)
        self.queued = metrics.queued.labels(model)
        self.duration = metrics.duration.labels(model)
        self.ttft = metrics.ttft.labels(model)
        self.itl = metrics.itl.labels(model)
        self.input_tokens = metrics.input_tokens.labels(model)
        self.output_length = metrics.output_length.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.output_tokens = metrics.output_tokens.labels(model)
        self._started: dict[tuple[str, str], Counter] = {}
        self._succeeded: dict[tuple[str, str], Counter] = {}

    def started(self, endpoint: str, kind: str) -> Counter:
        """`requests_started_total` of one endpoint and request type."""
        found = self._started.get((endpoint, kind))
        if found is None:
            found = self._started[endpoint, kind] = self.metrics.started.labels(self.model, endpoint, kind)
        return found

    def succeeded(self, endpoint: str, kind: str) -> Counter:
        """`requests_total` of one endpoint and request type, with success."""
        found = self._succeeded.get((endpoint, kind))
        if found is None:
            found = self.metrics.requests.labels(self.model, endpoint, kind, "success", "")
            self._succeeded[endpoint, kind] = found
        return found


class RequestMeter:
    """The measurements of one HTTP request, from the moment its handler was entered to its last byte.

    Times are those of `time.perf_counter`, in seconds.
    """

    __slots__ = ("_series", "endpoint", "first_token_at", "kind", "last_token_at", "output_tokens", "received_at")

    def __init__(self, series: ModelSeries, endpoint: str, kind: str, received_at: float) -> None:
        self._series = series
        self.endpoint = endpoint
        self.kind = kind
        self.received_at = received_at
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.output_tokens = 0
        series.active.value += 1
        series.inflight.value += 1
        series.queued.value += 1
        series.started(endpoint, kind).value += 1

    def prompt(self, tokens: int) -> None:
        """A prompt of so many tokens goes to a worker."""
        self._series.input_tokens.observe(tokens)

    def tokens(self, now: float, before: float, count: int) -> None:
        """`count` tokens of one choice came at `now`, after those at `before` (0: its first ones).

        Called for every output of every stream, so it counts in place.
        """
        series = self._series
        self.last_token_at = now
        self.output_tokens += count
        series.output_tokens.value += count
        if before:
            itl = series.itl
            elapsed_s = now - before
            itl.counts[bisect_left(itl.bounds, elapsed_s / count)] += count
            itl.sum += elapsed_s
        elif not self.first_token_at:
            self.first_token_at = now
            series.queued.value -= 1
            series.ttft.observe(now - self.received_at)

    def finish(self, error_type: str = "", cached_tokens: int | None = None) -> None:
        """The request is over; `error_type` "" means success. To be called exactly once."""
        series = self._series
        series.active.value -= 1
        series.inflight.value -= 1
        if self.first_token_at:
            series.output_length.observe(self.output_tokens)
        else:
            series.queued.value -= 1
        if cached_tokens is not None:
            series.cached_tokens.observe(cached_tokens)
        series.duration.observe(perf_counter() - self.received_at)
        if error_type:
            requests = series.metrics.requests
            requests.labels(series.model, self.endpoint, self.kind, "error", error_type).value += 1
        else:
            series.succeeded(self.endpoint, self.kind).value += 1
