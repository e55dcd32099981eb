"""How does an engine become a worker?

    start:  engine → endpoint in discovery → model card → ready
    serve:  requests to the engine, outputs to streams, events and load to routers
    change: another role, if the engine can: another endpoint and card, then away from the first (`dynamo.engine.seat`)
    end:    leave discovery → callers look elsewhere → finish what is in flight → stop the engine

An engine that dies takes its worker along: what is in flight fails at once with EngineShutdown, and the exit
status is 1, so that whatever supervises the process starts a new one. One that hangs fails what is in flight too,
and is left out of routing until it answers again.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import msgspec

from dynamo.engine.admission import Admission, engine_request_limit
from dynamo.engine.contract import EngineConfig, LLMEngine, Submit
from dynamo.engine.dispatcher import Dispatcher, Way
from dynamo.engine.gauges import EngineGauges
from dynamo.engine.handoff import NO_HANDOFF
from dynamo.engine.reports import Reports
from dynamo.engine.seat import InstanceEndpoint, Seat
from dynamo.engine.stalls import DEFAULT_STALL_S, StallWatch
from dynamo.engine.takeover import Claims
from dynamo.engine.worker_args import ROLES, Role, WorkerOptions
from dynamo.llm.kv_events import KvEventData, LoadMetrics, StorageTier
from dynamo.llm.model_card import ModelInput, ModelRuntimeConfig, ModelType, WorkerType
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest, StopConditions
from dynamo.llm.registration import register_model, unregister_model
from dynamo.llm.topology import Topology, read_topology
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.component import Endpoint
from dynamo.runtime.errors import DynamoException, EngineShutdown, InvalidArgument
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


class EngineWorker:
    """One engine being served: the `EngineCallbacks` of its engine. Use `serve_engine` unless there is more to do
    between `start` and `run`, such as registering adapters."""

    def __init__(self, runtime: DistributedRuntime, engine: LLMEngine, options: ServeOptions) -> None:
        self.runtime = runtime
        self.engine = engine
        self.options = options
        instance_id = runtime.instance_id if options.instance_id is None else options.instance_id
        self.config: EngineConfig
        self.dispatcher: Dispatcher
        self.on_register: list[Callable[[Endpoint, Role], Awaitable[object]]] = []
        """What else is registered beside the model, wherever the worker serves: adapters."""
        self._topology: Topology | None = None
        self._gauges: EngineGauges
        self._death: str | None = None
        self._stalls = StallWatch(env_number("DYN_ENGINE_STALL_TIMEOUT", DEFAULT_STALL_S))
        self._tasks: list[asyncio.Task[None]] = []
        self._changing = asyncio.Lock()
        self._seat = Seat(runtime, options.worker.disaggregation_mode, options.worker, instance_id)
        self._seats = {self._seat.role: self._seat}
        self._reports: Reports | None = None  # where events and load go now
        self._bind_handoff()

    def _bind_handoff(self) -> None:
        """Give the engine what it needs to be half of a pair. Raises ValueError for an engine that cannot be."""
        if self._seat.handoff is None:
            return
        bind = getattr(self.engine, "bind_handoff", None)
        if bind is None:
            raise ValueError(f"--disaggregation-mode {self.role}: this engine does whole requests only; use agg")
        bind(self._seat.handoff)

    @property
    def role(self) -> Role:
        """Which part of a request's work it does now."""
        return self._seat.role

    @property
    def endpoint(self) -> InstanceEndpoint:
        """Where it serves now."""
        return self._seat.endpoint

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.config.served_model_name or self.config.model

    # --- start

    async def start(self) -> bool:
        """Start the engine and offer it. False if the process was told to end meanwhile; then nothing is left.

        Raises:
            DynamoException: discovery or the request plane cannot be used, or the model directory is no good.
            ValueError: the worker's place cannot be read; names the variable.
        """
        began = time.monotonic()
        self._topology = await read_topology()
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
            await self._stop_serving()
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
        self.dispatcher = Dispatcher(self.engine, admission)
        self._gauges.hit_rate.set_function(self.dispatcher.hit_rate)
        await self._open(self._seat, self.engine.submit)
        self._tasks.append(asyncio.get_running_loop().create_task(self._watch_health()))

    async def _open(self, seat: Seat, submit: Submit | None = None) -> None:
        """Take requests at a seat, and say so. `submit` is its way into the engine, if it has none yet."""
        if submit is not None:
            keep = seat.handoff.keep if isinstance(seat.handoff, Claims) else None
            seat.way = Way(submit, seat.role == "prefill", keep)
        seat.reports = Reports(
            seat.endpoint, seat.endpoint.instance_id, self.config, self._gauges, lambda: self.dispatcher.num_queued
        )
        await seat.prepare()
        if self._reports is not None:
            seat.reports.take_over(self._reports)
        self._reports = seat.reports
        await seat.open(
            self.dispatcher.handler(seat.way),
            [("model", self.model_name)],
            self._health_check_payload(),
        )
        await self._register(seat)

    def _health_check_payload(self) -> dict[str, Any]:
        return self.options.worker.health_check_payload or health_check_request(self.model_name)

    async def _register(self, seat: Seat) -> None:
        config, worker = self.config, self.options.worker
        await register_model(
            ModelInput.Tokens,
            reduce(or_, (_MODEL_TYPES[word] for word in worker.endpoint_types)),
            seat.endpoint,
            self.options.model_path,
            self.model_name,
            worker_type=WORKER_TYPES[seat.role],
            kv_cache_block_size=config.kv_cache_block_size,
            runtime_config=self.runtime_config(seat.role),
            user_data=self.options.user_data,
            custom_template_path=worker.custom_jinja_template,
            model_aliases=config.model_aliases or None,
        )
        for register in self.on_register:
            await register(seat.endpoint, seat.role)

    def runtime_config(self, role: Role) -> ModelRuntimeConfig:
        """What its cards say of the engine and of the worker's place."""
        config = self.config
        tells_kv = config.publishes_kv_events and config.kv_cache_block_size is not None
        told = ModelRuntimeConfig(
            context_length=config.context_length,
            total_kv_blocks=config.total_kv_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            data_parallel_start_rank=config.data_parallel_start_rank,
            data_parallel_size=config.data_parallel_size,
            enable_local_indexer=tells_kv,
            kv_event_publishing_enabled=tells_kv,
            runtime_data=config.runtime_data,
            bootstrap_host=config.bootstrap_host if role == "prefill" else None,
            bootstrap_port=config.bootstrap_port if role == "prefill" else None,
        )
        if self._topology is not None:
            self._topology.write(told)
        return told

    # --- another role

    async def change_role(self, role: Role) -> None:
        """Serve as another half of a pair, or as a whole, from now on. Returns once callers can find it there.

        Raises:
            InvalidArgument: there is no such role, or the engine cannot take it.
            DynamoException: discovery cannot be used; it serves as before.
        """
        if role not in ROLES:
            raise InvalidArgument(f"role: {role!r} is not one of {', '.join(ROLES)}", "role")
        async with self._changing:
            before = self._seat
            if role == before.role:
                return
            if self.runtime.is_shutting_down():
                raise EngineShutdown("the worker is shutting down")
            seat = self._seats.get(role)
            submit = None if seat is not None else self._take_role(role)
            seat = self._seats[role]
            try:
                await self._open(seat, submit)
            except BaseException:
                self._reports = before.reports
                await self._withdraw(seat)
                await seat.leave()
                raise
            self._seat = seat
            log.warning("this worker is %s now, at %s; before it was %s", role, seat.endpoint.path, before.role)
            await self._withdraw(before)
            await before.leave()

    def _take_role(self, role: Role) -> Submit:
        take: Callable[[object], Submit] | None = getattr(self.engine, "take_role", None)
        if take is None:
            raise InvalidArgument(f"role: this engine cannot become {role} while it serves", "role")
        seat = Seat(self.runtime, role, self.options.worker, self.endpoint.instance_id)
        submit = take(seat.handoff)
        self._seats[role] = seat
        return submit

    # --- the engine's answers

    def on_outputs(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        """See `EngineCallbacks`."""
        self._stalls.sign()
        self.dispatcher.on_outputs(outputs)

    def on_error(self, request_id: str, error: Exception) -> None:
        """See `EngineCallbacks`."""
        self.dispatcher.on_error(request_id, error)

    def on_kv_events(self, events: list[KvEventData], dp_rank: int = 0, tier: StorageTier = "device") -> None:
        """See `EngineCallbacks`. Events from before the worker is offered are of blocks that nobody routes to yet."""
        self._stalls.sign()
        if self._reports is not None:
            self._reports.kv_events(events, dp_rank, tier)

    def on_load(self, load: LoadMetrics) -> None:
        """See `EngineCallbacks`."""
        self._stalls.sign()
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
        return self._reports is not None and self.dispatcher.callers_are_behind()

    async def _watch_health(self) -> None:
        """An engine may die, or hang, without a word."""
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
            await self._look_for_a_stall()

    async def _look_for_a_stall(self) -> None:
        """A decode worker is not judged so: its requests may wait in the engine for KV of others."""
        inside = self.dispatcher.num_requests - self.dispatcher.num_queued
        has_work = inside > 0 and not isinstance(self._seat.handoff, Claims)
        served = self._seat.served
        if self._stalls.is_stalled(time.monotonic(), has_work) and served is not None:
            reason = f"the engine has {inside} requests and has done nothing for {self._stalls.limit_s:g} s"
            try:
                await served.suspect(reason, self._health_check_payload())
            except DynamoException as e:
                log.warning("leaving discovery: %s", e)

    # --- end

    async def run(self) -> int:
        """Serve until the runtime has shut down, in order, or the engine died. Returns the exit status, 0 or 1."""
        await self.runtime.wait_shutdown()
        began = time.monotonic()
        await self._withdraw(self._seat)
        await self.runtime.wait_drained()
        self._gauges.drain_time.set(time.monotonic() - began)
        began = time.monotonic()
        await self._stop_engine()
        self._gauges.cleanup_time.set(time.monotonic() - began)
        return 1 if self._death else 0

    async def _withdraw(self, seat: Seat) -> None:
        """Take the model card out, so that frontends stop offering the model if this was its last worker."""
        try:
            await unregister_model(seat.endpoint)
        except DynamoException as e:
            log.warning("withdrawing the model card: %s; it will expire", e)

    async def _stop_serving(self) -> None:
        """Take no more requests, and kill what is in flight."""
        if self._seat.served is not None:
            await self._seat.served.stop()

    async def _stop_engine(self) -> None:
        for seat in self._seats.values():
            await seat.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
