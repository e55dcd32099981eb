"""How does an engine become a worker?

    start:  engine → endpoint in discovery → model card → ready
    serve:  requests to the engine, outputs to streams, events and load to routers
    end:    leave discovery → callers look elsewhere → finish what is in flight → stop the engine

An engine that dies takes its worker along: what is in flight fails at once with EngineShutdown, and the exit
status is 1, so that whatever supervises the process starts a new one.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import msgspec

from dynamo.engine.admission import Admission, engine_request_limit
from dynamo.engine.contract import EngineConfig, LLMEngine
from dynamo.engine.dispatcher import Dispatcher
from dynamo.engine.gauges import EngineGauges
from dynamo.engine.handoff import HANDOFF_ENDPOINT, NO_HANDOFF, Ledger
from dynamo.engine.reports import Reports
from dynamo.engine.takeover import Claims
from dynamo.engine.transfer_metrics import DecodeMetrics, PrefillMetrics
from dynamo.engine.worker_args import DEFAULT_COMPONENT, PREFILL_COMPONENT, WorkerOptions
from dynamo.llm.kv_events import KvEventData, LoadMetrics, StorageTier
from dynamo.llm.model_card import ModelInput, ModelRuntimeConfig, ModelType, WorkerType
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest, StopConditions
from dynamo.llm.registration import register_model, unregister_model
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.component import Endpoint, ServedEndpoint
from dynamo.runtime.errors import DynamoException, EngineShutdown
from dynamo.runtime.metrics import endpoint_labels
from dynamo.runtime.options import env_number

log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 2.0  # DYN_ENGINE_HEALTH_CHECK_INTERVAL
HEALTH_TIMEOUT_S = 10.0  # DYN_ENGINE_HEALTH_CHECK_TIMEOUT
STOP_TIMEOUT_S = 30.0  # for an engine to free its memory and end its processes

_MODEL_TYPES = {"chat": ModelType.Chat, "completions": ModelType.Completions}
WORKER_TYPES = {"agg": WorkerType.Aggregated, "prefill": WorkerType.Prefill, "decode": WorkerType.Decode}


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve where. `model_path` is the directory whose tokenizer and template frontends get."""

    model_path: Path
    worker: WorkerOptions = field(default_factory=WorkerOptions)
    instance_id: int | None = None  # several workers of one process each have their own
    user_data: dict[str, Any] | None = None


class InstanceEndpoint(Endpoint):
    """An endpoint seen as one of several instances that this process serves."""

    def __init__(self, endpoint: Endpoint, instance_id: int) -> None:
        super().__init__(endpoint.runtime, endpoint.address)
        self.instance_id = instance_id

    def connection_id(self) -> int:
        """The id of this instance."""
        return self.instance_id


class EngineWorker:
    """One engine being served: the `EngineCallbacks` of its engine. Use `serve_engine` unless there is more to do
    between `start` and `run`, such as registering adapters."""

    def __init__(self, runtime: DistributedRuntime, engine: LLMEngine, options: ServeOptions) -> None:
        self.runtime = runtime
        self.engine = engine
        self.options = options
        instance_id = runtime.instance_id if options.instance_id is None else options.instance_id
        self.endpoint = InstanceEndpoint(runtime.endpoint(options.worker.endpoint), instance_id)
        self.config: EngineConfig
        self.dispatcher: Dispatcher
        self._reports: Reports | None = None
        self._gauges: EngineGauges
        self._served: ServedEndpoint | None = None
        self._death: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._handoff = self._make_handoff()

    def _make_handoff(self) -> Ledger | Claims | None:
        """What an engine needs that is half of a pair. Raises ValueError for an engine that cannot be."""
        worker, endpoint = self.options.worker, self.endpoint
        role = worker.disaggregation_mode
        if role == "agg":
            return None
        bind = getattr(self.engine, "bind_handoff", None)
        if bind is None:
            raise ValueError(f"--disaggregation-mode {role}: this engine does whole requests only; use agg")
        base = endpoint_labels(endpoint.namespace, endpoint.component, None, endpoint.instance_id)
        handoff: Ledger | Claims
        if role == "prefill":
            path = f"{endpoint.namespace}.{endpoint.component}.{HANDOFF_ENDPOINT}"
            handoff = Ledger(path, endpoint.instance_id, PrefillMetrics(self.runtime.metrics, base))
        else:
            handoff = Claims(self.runtime, DecodeMetrics(self.runtime.metrics, base), worker.on_lost_kv)
        bind(handoff)
        return handoff

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.config.served_model_name or self.config.model

    # --- start

    async def start(self) -> bool:
        """Start the engine and offer it. False if the process was told to end meanwhile; then nothing is left.

        Raises:
            DynamoException: discovery or the request plane cannot be used, or the model directory is no good.
        """
        began = time.monotonic()
        try:
            config = await self._unless_shutdown(self.engine.start(self))
            if config is None:
                await self._stop_engine()
                return False
            self.config = config
            try:
                await self._offer(time.monotonic() - began)
            except EngineShutdown:
                if not self.runtime.is_shutting_down():
                    raise
                # The end came while it was being offered: `run` sees to it as to any other.
        except BaseException:
            if self._served is not None:
                await self._served.stop()
            await self._stop_engine()
            raise
        return True

    async def _unless_shutdown(self, starting: Awaitable[EngineConfig]) -> EngineConfig | None:
        """Engines may take minutes to start; a signal in that time ends the program, not the start."""
        start = asyncio.ensure_future(starting)
        shutdown = asyncio.ensure_future(self.runtime.wait_shutdown())
        try:
            await asyncio.wait((start, shutdown), return_when=asyncio.FIRST_COMPLETED)
            return start.result() if start.done() else None
        finally:
            for task in (start, shutdown):
                task.cancel()
            await asyncio.gather(start, shutdown, return_exceptions=True)

    async def _offer(self, load_s: float) -> None:
        config, worker, metrics = self.config, self.options.worker, self.runtime.metrics
        instance_id = self.endpoint.instance_id
        self._gauges = EngineGauges(metrics, self.endpoint, instance_id, config)
        self._gauges.load_time.set(load_s)
        admission = Admission(
            engine_request_limit(worker.engine_request_limit, config),
            worker.request_queue_limit,
            metrics.admission.engine_requests,
            metrics.admission.queued_requests,
            metrics.admission.rejected,
        )
        role = worker.disaggregation_mode
        keep = self._handoff.keep if isinstance(self._handoff, Claims) else None
        self.dispatcher = Dispatcher(self.engine, admission, one_choice=role == "prefill", keep=keep)
        self._gauges.hit_rate.set_function(self.dispatcher.hit_rate)
        self._reports = Reports(
            self.endpoint, instance_id, config, self._gauges, waiting=lambda: self.dispatcher.num_queued
        )
        await self._reports.start()
        await self._start_handoff()
        self._served = await self.endpoint.start_push_endpoint(
            self.dispatcher.handle,
            metrics_labels=[("model", self.model_name)],
            health_check_payload=worker.health_check_payload or health_check_request(self.model_name),
            instance_id=instance_id,
        )
        await self._register()
        self._tasks.append(asyncio.get_running_loop().create_task(self._watch_health()))

    async def _start_handoff(self) -> None:
        """Serve claims before there can be any, or begin to watch who serves them."""
        if isinstance(self._handoff, Ledger):
            endpoint = self.runtime.endpoint(self._handoff.endpoint)
            await endpoint.start_push_endpoint(self._handoff.handle, instance_id=self.endpoint.instance_id)
        elif isinstance(self._handoff, Claims):
            component = PREFILL_COMPONENT if self.endpoint.component == DEFAULT_COMPONENT else self.endpoint.component
            await self._handoff.prepare(f"{self.endpoint.namespace}.{component}.{HANDOFF_ENDPOINT}")

    async def _register(self) -> None:
        config, worker = self.config, self.options.worker
        await register_model(
            ModelInput.Tokens,
            reduce(or_, (_MODEL_TYPES[word] for word in worker.endpoint_types)),
            self.endpoint,
            self.options.model_path,
            self.model_name,
            worker_type=WORKER_TYPES[worker.disaggregation_mode],
            kv_cache_block_size=config.kv_cache_block_size,
            runtime_config=ModelRuntimeConfig(
                context_length=config.context_length,
                total_kv_blocks=config.total_kv_blocks,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                data_parallel_start_rank=config.data_parallel_start_rank,
                data_parallel_size=config.data_parallel_size,
                enable_local_indexer=config.publishes_kv_events and config.kv_cache_block_size is not None,
                kv_event_publishing_enabled=config.publishes_kv_events and config.kv_cache_block_size is not None,
                runtime_data=config.runtime_data,
                bootstrap_host=config.bootstrap_host,
                bootstrap_port=config.bootstrap_port,
            ),
            user_data=self.options.user_data,
            custom_template_path=worker.custom_jinja_template,
            model_aliases=config.model_aliases or None,
        )

    # --- the engine's answers

    def on_outputs(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        """See `EngineCallbacks`."""
        self.dispatcher.on_outputs(outputs)

    def on_error(self, request_id: str, error: Exception) -> None:
        """See `EngineCallbacks`."""
        self.dispatcher.on_error(request_id, error)

    def on_kv_events(self, events: list[KvEventData], dp_rank: int = 0, tier: StorageTier = "device") -> None:
        """See `EngineCallbacks`. Events from before the worker is offered are of blocks that nobody routes to yet."""
        if self._reports is not None:
            self._reports.kv_events(events, dp_rank, tier)

    def on_load(self, load: LoadMetrics) -> None:
        """See `EngineCallbacks`."""
        if self._reports is not None:
            self._reports.load(load)

    def on_death(self, reason: str) -> None:
        """See `EngineCallbacks`. Nothing in flight can be finished: fail it now and leave."""
        if self._death is None:
            self._death = reason
            log.error("the engine is dead: %s", reason)
            if self._reports is not None:
                self.dispatcher.close(reason)
            self.runtime.shutdown()

    def callers_are_behind(self) -> bool:
        """Whether no caller keeps up. An engine that could fill any socket may wait then."""
        return self._served is not None and self.dispatcher.callers_are_behind()

    async def _watch_health(self) -> None:
        """An engine may die without a word."""
        interval = env_number("DYN_ENGINE_HEALTH_CHECK_INTERVAL", HEALTH_INTERVAL_S)
        timeout = env_number("DYN_ENGINE_HEALTH_CHECK_TIMEOUT", HEALTH_TIMEOUT_S)
        while self._death is None:
            await asyncio.sleep(interval)
            try:
                async with asyncio.timeout(timeout):
                    await self.engine.check_health()
            except TimeoutError:
                self.on_death(f"it did not answer its health check within {timeout:g} s")
            except DynamoException as e:
                self.on_death(e.message)

    # --- end

    async def run(self) -> int:
        """Serve until the runtime has shut down, in order, or the engine died. Returns the exit status, 0 or 1."""
        await self.runtime.wait_shutdown()
        began = time.monotonic()
        await self._withdraw()
        await self.runtime.wait_drained()
        self._gauges.drain_time.set(time.monotonic() - began)
        began = time.monotonic()
        await self._stop_engine()
        self._gauges.cleanup_time.set(time.monotonic() - began)
        return 1 if self._death else 0

    async def _withdraw(self) -> None:
        """Take the model card out, so that frontends stop offering the model if this was its last worker."""
        try:
            await unregister_model(self.endpoint)
        except DynamoException as e:
            log.warning("withdrawing the model card: %s; it will expire", e)

    async def _stop_engine(self) -> None:
        if isinstance(self._handoff, Ledger):
            self._handoff.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._reports is not None:
            await self._reports.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.engine.stop()
        except TimeoutError:
            log.warning("the engine did not stop within %g s", STOP_TIMEOUT_S)


async def serve_engine(runtime: DistributedRuntime, engine: LLMEngine, options: ServeOptions) -> int:
    """Start an engine and serve it until the end. Returns the exit status of the process. Raises as `start`."""
    worker = EngineWorker(runtime, engine, options)
    return await worker.run() if await worker.start() else 0


def health_check_request(model: str) -> dict[str, Any]:
    """The least that any engine answers: one token after one token."""
    stop = StopConditions(max_tokens=1, ignore_eos=True)
    request = PreprocessedRequest(model, [1], stop, annotations=[NO_HANDOFF])
    return dict(msgspec.to_builtins(request))
