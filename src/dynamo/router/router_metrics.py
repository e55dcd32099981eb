"""How are a router's numbers shown to Prometheus? (facts rows O21 to O26, O30, O33)

The router counts in plain numbers (`RouterStats`). Histograms are shown as they are; the rest is copied at each scrape.
"""

from typing import TYPE_CHECKING

from dynamo import prometheus_names as names
from dynamo.llm.model_card import WorkerType
from dynamo.router.types import WorkerKey
from dynamo.runtime.instruments import Counter, Gauge, Histogram, LabelPairs
from dynamo.runtime.metrics import Metrics

if TYPE_CHECKING:
    from dynamo.router.model_router import ModelRouter

_n, _ms = names.router, names.routing_overhead
_POLICIES = ("ttl", "lru", "disabled")


def base_labels(metrics: Metrics, namespace: str, component: str, model: str) -> LabelPairs:
    """The labels that all series of one model's router have."""
    return (
        (names.labels.COMPONENT, component),
        (names.labels.NAMESPACE, namespace),
        *metrics.worker_label,
        (names.labels.MODEL, model),
    )


class RouterMetrics:
    """The series of one `ModelRouter`, from now until `close`.

    Beside the labels that dashboards know, each has `model`: several models of one process must not share a series.
    """

    def __init__(self, metrics: Metrics, router: "ModelRouter", base: LabelPairs, worker_type: WorkerType) -> None:
        self._metrics = metrics
        self._router = router
        self._base = base
        self._type = "prefill" if worker_type is WorkerType.Prefill else "decode"
        self._dropped: list[tuple[str, LabelPairs, str]] = []
        self._counters: dict[str, Counter] = {}
        self._workers: dict[WorkerKey, LabelPairs] = {}
        self._registered = metrics.gauge(_n.WORKER_REGISTERED, "Workers that requests may go to, 1 each")
        router_id = ((names.labels.ROUTER_ID, str(metrics.instance_id)),)
        phase = (*router_id, ("phase", "prefill" if self._type == "prefill" else "aggregated"))
        stats = router.stats
        for name, text in (
            (_n.REQUESTS_STARTED_TOTAL, "Requests that were sent to a worker"),
            (_n.REQUESTS_TOTAL, "Requests that wanted a worker"),
        ):
            self._counter(name, text, router_id)
        for name, text in (
            (_n.KV_BEST_ELIGIBLE_CACHED_PREFIX_TOKENS_TOTAL, "Prompt tokens that the worker which held most had"),
            (_n.KV_SELECTED_CACHED_PREFIX_TOKENS_TOTAL, "Prompt tokens that the chosen worker had"),
            (_n.KV_WORKER_REUSED_TOKENS_TOTAL, "Prompt tokens that workers said they had"),
        ):
            self._counter(name, text, phase)
        lost = (*router_id, (names.labels.WORKER_TYPE, "prefill"))  # an overlap is lost on the prompt's part
        self._counter(_n.NON_MAX_OVERLAP_SELECTIONS_TOTAL, "Choices of a worker that held less than another", lost)
        for name, text, histogram, more in (
            (_n.TIME_TO_FIRST_TOKEN_SECONDS, "From routing to the first token", stats.time_to_first_token_seconds, ()),
            (_n.INTER_TOKEN_LATENCY_SECONDS, "Mean of a request", stats.inter_token_latency_seconds, ()),
            (_n.OUTPUT_SEQUENCE_TOKENS, "Tokens of an answer", stats.output_sequence_tokens, ()),
            (_n.KV_HIT_RATE, "Share of a prompt that its worker had cached", stats.kv_hit_rate, ()),
            (_n.INPUT_SEQUENCE_TOKENS, "Tokens of a prompt", stats.input_sequence_tokens, phase[1:]),
            (_n.OVERLAP_BLOCKS_LOST, "Blocks that another worker held more", stats.overlap_blocks_lost, lost[1:]),
        ):
            self._show(name, text, histogram, (*base, *router_id, *more), names.name_prefix.COMPONENT)
        for name, text, histogram in (
            (_ms.BLOCK_HASHING_MS, "Hashing a prompt's blocks, of every 512th", stats.block_hashing_ms),
            (_ms.SEQ_HASHING_MS, "Chaining the hashes, of every 512th", stats.seq_hashing_ms),
            (_ms.INDEXER_FIND_MATCHES_MS, "Looking up who holds it, of every 64th", stats.find_matches_ms),
            (_ms.SCHEDULING_MS, "Choosing, lookup included, of every 64th", stats.scheduling_ms),
            (_ms.TOTAL_MS, "All of routing but the hashing, of every 64th", stats.total_ms),
        ):
            self._show(name, text, histogram, (*router_id, base[-1]), names.name_prefix.ROUTER)
        self._silent = self._gauge(
            _n.KV_EVENT_SOURCE_MISMATCH_WORKERS, "Ranks of workers whose cache cannot be known", self._target()
        )
        self._cache_policy()
        self._blocks = None
        if router.guess is not None:
            self._blocks = self._gauge(_n.APPROXIMATE_CACHE_BLOCKS, "Blocks that workers are guessed to hold", ())
        metrics.on_scrape(self.update)

    def _target(self) -> LabelPairs:
        component, namespace = self._base[0][1], self._base[1][1]
        return (
            ("target_component", component),
            ("target_endpoint", self._router.endpoint_name),
            ("target_namespace", namespace),
            (names.labels.WORKER_TYPE, self._type),
        )

    def _cache_policy(self) -> None:
        """Which way of guessing was asked for, and which one is in effect: 1 for that, 0 for the others."""
        config = self._router.config
        policy = "disabled" if config.use_kv_events else config.router_approximate_cache_policy
        for name in (_n.APPROXIMATE_CACHE_CONFIGURED_POLICY, _n.APPROXIMATE_CACHE_EFFECTIVE_POLICY):
            for each in _POLICIES:
                gauge = self._gauge(name, "How the cache of workers is guessed without events", (("policy", each),))
                gauge.value = int(each == policy)

    def _counter(self, name: str, text: str, more: LabelPairs) -> None:
        pairs = (*self._base, *more)
        self._counters[name] = self._metrics.counter(name, text).series(pairs)
        self._dropped.append((name, pairs, names.name_prefix.COMPONENT))

    def _gauge(self, name: str, text: str, more: LabelPairs) -> Gauge:
        pairs = (*self._base, *more)
        self._dropped.append((name, pairs, names.name_prefix.COMPONENT))
        return self._metrics.gauge(name, text).series(pairs)

    def _show(self, name: str, text: str, histogram: Histogram, pairs: LabelPairs, prefix: str) -> None:
        family = self._metrics.histogram(name, text, bounds=histogram.bounds, prefix=prefix)
        family.adopt(pairs, histogram)
        self._dropped.append((name, pairs, prefix))

    def update(self) -> None:
        """Copy the numbers of now."""
        router = self._router
        stats, counters = router.stats, self._counters
        counters[_n.REQUESTS_TOTAL].value = stats.requests
        counters[_n.REQUESTS_STARTED_TOTAL].value = stats.requests_started
        counters[_n.KV_BEST_ELIGIBLE_CACHED_PREFIX_TOKENS_TOTAL].value = stats.best_eligible_cached_tokens
        counters[_n.KV_SELECTED_CACHED_PREFIX_TOKENS_TOTAL].value = stats.selected_cached_tokens
        counters[_n.KV_WORKER_REUSED_TOKENS_TOTAL].value = stats.worker_reused_tokens
        counters[_n.NON_MAX_OVERLAP_SELECTIONS_TOTAL].value = stats.non_max_overlap_selections
        self._silent.value = len(router.silent)
        if self._blocks is not None and router.guess is not None:
            self._blocks.value = len(router.guess)
        self._update_workers()

    def _update_workers(self) -> None:
        there = self._router.scheduler.load.position
        for worker in [worker for worker in self._workers if worker not in there]:
            self._registered.drop(self._workers.pop(worker))
        for worker in there:
            if worker not in self._workers:
                pairs = self._workers[worker] = (
                    *self._base,
                    (names.labels.DP_RANK, str(worker.dp_rank)),
                    ("router_worker_id", str(worker.worker_id)),
                    (names.labels.WORKER_TYPE, self._type),
                )
                self._registered.series(pairs).value = 1

    def close(self) -> None:
        """The router is over: show nothing of it. Safe to call twice."""
        self._metrics.off_scrape(self.update)
        for pairs in self._workers.values():
            self._registered.drop(pairs)
        self._workers.clear()
        for name, pairs, prefix in self._dropped:
            self._metrics.drop(name, pairs, prefix=prefix)
