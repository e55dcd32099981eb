"""Which numbers of an engine does Prometheus see? (`dynamo_component_*`, the same names for all engines.)"""

from dynamo import prometheus_names as names
from dynamo.engine.contract import EngineConfig
from dynamo.runtime.component import Endpoint
from dynamo.runtime.instruments import Gauge
from dynamo.runtime.metrics import Metrics, endpoint_labels


class EngineGauges:
    """One worker's gauges. Shares are 0..1, whatever the name says: dashboards expect it so."""

    def __init__(self, metrics: Metrics, endpoint: Endpoint, instance_id: int, config: EngineConfig) -> None:
        self._metrics = metrics
        self._base = endpoint_labels(endpoint.namespace, endpoint.component, None, instance_id)
        self._model = config.served_model_name or config.model
        first = config.data_parallel_start_rank
        self.cache_usage: dict[int, Gauge] = {}
        for rank in range(first, first + config.data_parallel_size):
            self._gauge(names.kvstats.TOTAL_BLOCKS, "KV blocks of the engine", rank).set(config.total_kv_blocks or 0)
            self.cache_usage[rank] = self._gauge(
                names.kvstats.GPU_CACHE_USAGE_PERCENT, "Share of the KV blocks in use", rank
            )
        self.hit_rate = self._gauge(
            names.kvstats.KV_CACHE_HIT_RATE, "Share of all prompt tokens found in the cache", first
        )
        self.load_time = self._gauge(names.model_info.LOAD_TIME_SECONDS, "Seconds to start the engine", first)
        self.drain_time = self._gauge(names.lifecycle.DRAIN_TIME_SECONDS, "Seconds to finish what was in flight", first)
        self.cleanup_time = self._gauge(names.lifecycle.CLEANUP_TIME_SECONDS, "Seconds to stop the engine", first)

    def _gauge(self, name: str, help_: str, dp_rank: int) -> Gauge:
        family = self._metrics.gauge(name, help_, ("dp_rank", "model"), base=self._base)
        return family.labels(dp_rank, self._model)
