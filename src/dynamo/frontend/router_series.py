"""What do the KV routers of all models have queued, and how busy do they think their workers are? (O13 to O15)

Copied at each scrape from the routers' own numbers. `dynamo.router.router_metrics` shows the rest of them.
"""

from collections.abc import Iterable
from functools import partial
from typing import Protocol

from dynamo import prometheus_names as names
from dynamo.frontend.worker_set import WorkerSet
from dynamo.llm.model_card import WorkerType
from dynamo.router.model_router import ModelRouter
from dynamo.router.queue import ClassQueue
from dynamo.runtime.metrics import Metrics

_n = names.frontend_service
# The queue's words for what was refused, and those that dashboards know for limits of the queue.
_LIMITS = {"requests": "request_limit", "raw_isl_tokens": "raw_isl_token_limit", "cached_tokens": "cached_token_limit"}
_CLASS = ("model", "worker_type", "policy_class")


class _Models(Protocol):
    def sets(self) -> Iterable[WorkerSet]: ...


class RouterSeries:
    """The series of all models' routers with the frontend's prefix."""

    def __init__(self, metrics: Metrics, prefix: str, models: _Models) -> None:
        self._models = models

        gauge = partial(metrics.gauge, prefix=prefix, base=())
        counter = partial(metrics.counter, prefix=prefix, base=())
        worker = ("worker_id", "dp_rank", "worker_type")
        self._blocks = gauge(_n.WORKER_ACTIVE_DECODE_BLOCKS, "KV blocks of active requests", worker)
        self._tokens = gauge(_n.WORKER_ACTIVE_PREFILL_TOKENS, "Prompt tokens that are not computed yet", worker)
        self._waiting = gauge(_n.ROUTER_QUEUE_PENDING_REQUESTS, "Requests that wait for a worker", _CLASS)
        self._waiting_isl = gauge(_n.ROUTER_QUEUE_PENDING_ISL_TOKENS, "Their prompt tokens", _CLASS)
        self._waiting_cached = gauge(_n.ROUTER_QUEUE_PENDING_CACHED_TOKENS, "Those of them that are cached", _CLASS)
        self._received = counter(_n.ROUTER_ADMISSION_RECEIVED_TOTAL, "Requests that came to the router", _CLASS)
        self._rejected = counter(
            _n.ROUTER_ADMISSION_REJECTED_TOTAL, "Requests that no worker took, by why", (*_CLASS, "reason")
        )
        self._full = counter(
            _n.ROUTER_QUEUE_BACKPRESSURE_TOTAL, "Requests refused because the queue was full", (*_CLASS, "reason")
        )

    def update(self) -> None:
        """Copy the numbers of now."""
        for family in (self._blocks, self._tokens, self._waiting, self._waiting_isl, self._waiting_cached):
            family.clear()
        for worker_set in self._models.sets():
            if worker_set.router is not None:
                kind = "prefill" if worker_set.card.worker_type is WorkerType.Prefill else "decode"
                self._update(worker_set.router, worker_set.key.model, kind)

    def _update(self, router: ModelRouter, model: str, kind: str) -> None:
        load = router.scheduler.load
        for at, worker in enumerate(load.workers):
            labels = (worker.worker_id, worker.dp_rank, kind)
            self._blocks.labels(*labels).value += load.decode_blocks[at]
            self._tokens.labels(*labels).value += load.prefill_tokens[at]
        for name, queue in router.queue.classes.items():
            self._update_class(queue, (model, kind, name))
        default = router.queue.profile.classify(None, 0).name
        self._rejected.labels(model, kind, default, "busy").value = router.overload.refused

    def _update_class(self, queue: ClassQueue, labels: tuple[str, str, str]) -> None:
        self._waiting.labels(*labels).value += queue.requests
        self._waiting_isl.labels(*labels).value += queue.isl_tokens
        self._waiting_cached.labels(*labels).value += queue.cached_tokens
        self._received.labels(*labels).value = queue.received
        for word, reason in _LIMITS.items():
            self._full.labels(*labels, reason).value = queue.rejected[word]
        for reason, count in queue.rejected.items():
            if reason not in _LIMITS:
                self._rejected.labels(*labels, reason).value = count
