"""How is vLLM's engine core driven without vLLM's own front end?

The only file that touches vLLM's private interface. Requests go through vLLM's own input processor (40 µs each,
and its checks stay vLLM's), but answers come straight from the core's socket: one batch of token ids a step, no
detokenizer, no per-request queue or task. Written against, and gated to, the versions in `SUPPORTED`.
"""

import asyncio
import logging
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, LoRARequestStates, RequestStateStats

from dynamo.llm.protocols.engine import (
    CompletionUsage,
    EngineOutput,
    PromptTokensDetails,
    TopLogprob,
)
from dynamo.llm.protocols.engine import FinishReason as Finish
from dynamo.runtime.errors import DynamoException
from dynamo.vllm import guard, logprobs
from dynamo.vllm.driver import EXTERNAL_TOKENS, PARENT_ENV, DriverEvents, DriverRequest, EngineLoad
from dynamo.vllm.sampling import engine_error, invalid
from vllm import envs

log = logging.getLogger(__name__)

SUPPORTED = ("0.32",)
"""Minor versions of vLLM whose private interface this file was run against."""

_GENERATE = ("generate",)
_STEPS_TOGETHER = 32  # half a second's; keeps lists short where nobody scrapes
_NOT_ADDABLE = ("spec_decoding_stats", "kv_connector_stats", "ec_connector_stats", "perf_stats")
_STOP_TIMEOUT_S = 10.0  # for the core to end by itself; then vLLM kills it
_FINISH: dict[int, Finish] = {
    int(FinishReason.STOP): "stop",
    int(FinishReason.LENGTH): "length",
    int(FinishReason.ABORT): "cancelled",
    int(FinishReason.REPETITION): "stop",
}


@dataclass(slots=True)
class _Live:
    """A request in the core. `prompt_logprobs` collects over the chunks of a prefill."""

    request_id: str
    prompt_tokens: int
    eos_token_ids: frozenset[int]
    logprobs: int | None
    prompt_logprobs: int | None
    cached_tokens: int = 0
    external_tokens: int | None = None
    generated: int = 0
    cumulative: float = 0.0
    prompt_rows: list[list[TopLogprob] | None] | None = None
    max_tokens: int | None = None
    lora_name: str | None = None
    guided: bool = False
    taken_over: bool = False
    stats: Any = None


class EngineCoreDriver:
    """One vLLM engine, driven at its core. State is owned by the event loop's thread."""

    name = "core"

    def __init__(self, config: Any, log_stats: bool = True) -> None:
        """`config` is vLLM's `VllmConfig`; `log_stats` asks the core for its scheduler's numbers each step."""
        self._config = config
        self._log_stats = log_stats
        self._input = InputProcessor(config)
        self._core: Any = None
        self._starting: asyncio.Future[Any] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._live: dict[str, _Live] = {}  # by the id the core knows
        self._core_ids: dict[str, str] = {}  # by ours
        self._sent = 0
        self._dead: str | None = None
        self._stopped = False
        self._sends: set[asyncio.Task[None]] = set()
        self._metrics: _StepMetrics | None = None

    async def start(self, events: DriverEvents) -> None:
        self._events = events
        os.environ[PARENT_ENV] = str(os.getpid())
        executor = guard.guarded(Executor.get_class(self._config))
        # Loading takes a minute and blocks, so it runs beside the loop. The client's sockets join the loop at
        # their first use, which is ours, below.
        self._starting = asyncio.ensure_future(
            asyncio.to_thread(EngineCoreClient.make_async_mp_client, self._config, executor, self._log_stats)
        )
        self._core = await asyncio.shield(self._starting)
        envs.enable_envs_cache()  # vLLM's metrics read a variable per token; 20 µs each while it is looked up anew
        if self._log_stats:
            self._metrics = _StepMetrics(self._config, self._core.engine_ranks_managed)
        self._pump = asyncio.create_task(self._read_steps(), name="vllm-steps")

    def submit(self, request: DriverRequest) -> None:
        self._sent += 1
        core_id = str(self._sent)  # never used twice: what arrives late for an aborted request finds no one
        core_request = self._input.process_inputs(
            core_id,
            {"type": "token", "prompt_token_ids": request.token_ids}
            | ({"cache_salt": request.cache_salt} if request.cache_salt else {}),
            request.sampling_params,
            supported_tasks=_GENERATE,
            arrival_time=time.time(),
            lora_request=request.lora_request,
            priority=request.priority,
            data_parallel_rank=request.dp_rank,
        )
        params = core_request.sampling_params
        live = _Live(
            request_id=request.request_id,
            prompt_tokens=len(request.token_ids),
            eos_token_ids=request.eos_token_ids,
            logprobs=params.num_logprobs,
            prompt_logprobs=params.prompt_logprobs,
            max_tokens=params.max_tokens,
            lora_name=request.lora_request.lora_name if request.lora_request else None,
            guided=params.structured_outputs is not None,
            taken_over=bool((params.extra_args or {}).get("kv_transfer_params", {}).get("do_remote_prefill")),
            stats=RequestStateStats(arrival_time=core_request.arrival_time) if self._metrics else None,
        )
        self._live[core_id] = live
        self._core_ids[request.request_id] = core_id
        self._send(self._core.add_request_async(core_request), core_id)

    def abort(self, request_ids: list[str]) -> None:
        core_ids = [core_id for rid in request_ids if (core_id := self._core_ids.pop(rid, None))]
        for core_id in core_ids:
            live = self._live.pop(core_id)
            if self._metrics is not None:
                self._metrics.lora.request_finished(core_id, live.lora_name)
        if core_ids and self._dead is None:
            self._send(self._core.abort_requests_async(core_ids))

    def dead(self) -> str | None:
        return self._dead

    async def control(self, verb: str, *args: Any) -> Any:
        if self._core is None or self._dead:
            raise RuntimeError("the engine is not running")
        call: Callable[..., Any] = getattr(self._core, f"{verb}_async")
        return await call(*args)

    def flush_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.flush()

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._starting is not None and not self._starting.done():
            await guard.abandon(self._starting)
            if self._starting.done() and self._starting.exception() is None:
                self._core = self._starting.result()  # it was quicker
        if self._pump is not None:
            self._pump.cancel()
        if self._core is not None:
            await asyncio.to_thread(self._core.shutdown, _STOP_TIMEOUT_S)
        self._live.clear()
        self._core_ids.clear()

    def _send(self, sending: Any, core_id: str | None = None) -> None:
        # Tasks run their first step, which is the send, in the order they were made.
        task = asyncio.ensure_future(sending)
        self._sends.add(task)
        task.add_done_callback(lambda sent: self._sent_one(sent, core_id))

    def _sent_one(self, task: asyncio.Task[None], core_id: str | None) -> None:
        self._sends.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if core_id is None or isinstance(error, EngineDeadError):
            self._died(f"sending to vLLM's engine core failed: {error!r}")
        elif (live := self._live.pop(core_id, None)) is not None:  # a value that msgpack cannot carry
            self._core_ids.pop(live.request_id, None)
            self._events.on_failed(live.request_id, invalid(error))

    async def _read_steps(self) -> None:
        core = self._core
        try:
            while True:
                self._on_step(await core.get_output_async())
        except EngineDeadError:
            self._died("vLLM's engine core or one of its workers is gone")
        except DynamoException:
            raise
        except Exception as error:
            log.exception("reading from vLLM's engine core failed")
            self._died(f"reading from vLLM's engine core failed: {error!r}")

    def _died(self, reason: str) -> None:
        if self._dead is None and not self._stopped:
            self._dead = reason
            self._events.on_engine_death(reason)

    def _on_step(self, step: Any) -> None:
        batch: list[tuple[str, EngineOutput]] = []
        failed: list[_Live] = []
        metrics = self._metrics.begin(step) if self._metrics is not None else None
        for made in step.outputs:
            live = self._live.get(made.request_id)
            if live is None:  # aborted meanwhile
                if made.kv_transfer_params is not None:
                    self._events.on_kept(made.kv_transfer_params)
                continue
            if metrics is not None:
                metrics.token(made, live)
            if made.finish_reason is not None:
                del self._live[made.request_id]
                self._core_ids.pop(live.request_id, None)
                if made.finish_reason == FinishReason.ERROR:
                    failed.append(live)
                    continue
            elif not made.new_token_ids:
                _note_prefill(live, made)
                continue
            batch.append((live.request_id, _output(live, made)))
        if metrics is not None:
            metrics.end(step)
        if batch:
            self._events.on_step(batch)
        for live in failed:
            self._events.on_failed(live.request_id, engine_error(live.guided and not live.generated))
        if (stats := step.scheduler_stats) is not None:
            waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
            self._events.on_engine_load(
                EngineLoad(
                    step.engine_index,
                    stats.num_running_reqs,
                    waiting,
                    stats.kv_cache_usage,
                    stats.kv_connector_stats,
                )
            )


def _note_prefill(live: _Live, made: Any) -> None:
    if made.prefill_stats is not None:
        live.cached_tokens = made.prefill_stats.num_cached_tokens
        live.external_tokens = made.prefill_stats.num_external_cached_tokens
    if made.new_prompt_logprobs_tensors is not None and live.prompt_logprobs is not None:
        if live.prompt_rows is None:
            live.prompt_rows = [None]  # nothing precedes the first token
        live.prompt_rows.extend(logprobs.prompt_rows(made.new_prompt_logprobs_tensors, live.prompt_logprobs))


def _output(live: _Live, made: Any) -> EngineOutput:
    output = EngineOutput(token_ids=made.new_token_ids)
    first = live.generated == 0
    live.generated += len(made.new_token_ids)
    if first:
        _note_prefill(live, made)
        output.prompt_logprobs, live.prompt_rows = live.prompt_rows, None
        if live.taken_over and live.external_tokens is not None:
            output.engine_data = {EXTERNAL_TOKENS: live.external_tokens}
    if live.logprobs is not None and made.new_logprobs is not None:
        output.log_probs, output.top_logprobs = logprobs.rows(made.new_logprobs, live.logprobs)
        live.cumulative += sum(output.log_probs)
        output.cum_log_probs = live.cumulative
    if made.finish_reason is not None:
        output.finish_reason = _FINISH[made.finish_reason]
        output.stop_reason = made.stop_reason
        output.disaggregated_params = made.kv_transfer_params
        if output.finish_reason == "stop" and _is_eos(made, live):
            output.finish_reason = "eos"
        output.completion_usage = CompletionUsage(
            live.prompt_tokens,
            live.generated,
            live.prompt_tokens + live.generated,
            PromptTokensDetails(live.cached_tokens),
        )
    return output


def _is_eos(made: Any, live: _Live) -> bool:
    """vLLM gives no reason for the model's first end token, and the id for any other token that ended it."""
    if made.finish_reason != FinishReason.STOP:
        return False
    return made.stop_reason is None or made.stop_reason in live.eos_token_ids


class _StepMetrics:
    """vLLM's own `vllm:*` metrics, fed from the core's steps as vLLM's front end would.

    Handing a step to vLLM's metrics costs 300 µs however few tokens it made, so steps are added up and handed over
    together, at the latest when somebody looks. A token in the middle of an answer takes a short way besides: nearly
    all of a step's tokens follow the one before at the same distance, so they are counted by that distance.
    """

    def __init__(self, config: Any, ranks: list[int]) -> None:
        self._logger = PrometheusStatLogger(config, ranks)
        self._logger.log_engine_initialized()
        self.lora = LoRARequestStates(log_stats=True)
        self._pending = {rank: _Pending() for rank in ranks}
        self._step_tokens = self._logger.histogram_iteration_tokens  # per step, so not when steps are handed over
        self._logger.histogram_iteration_tokens = {rank: _Ignored() for rank in ranks}
        self._all_the_way = bool(envs.VLLM_COMPUTE_NANS_IN_LOGITS)

    def begin(self, step: Any) -> "_StepMetrics":
        self._now = step.timestamp
        self._at = self._pending[step.engine_index]
        self._at.iteration.iteration_timestamp = time.time()
        self._before = self._at.tokens()
        return self

    def token(self, made: Any, live: _Live) -> None:
        stats = live.stats
        before = stats.num_generation_tokens
        iteration = self._at.iteration
        if before and made.finish_reason is None and made.events is None and not self._all_the_way:
            count = len(made.new_token_ids)
            stats.num_generation_tokens = before + count
            iteration.num_generation_tokens += count
            latency = self._now - stats.last_token_ts
            latencies = self._at.latencies
            latencies[latency] = latencies.get(latency, 0) + 1
            stats.last_token_ts = self._now
            return
        iteration.update_from_output(made, self._now, before == 0, stats, self.lora, live.lora_name)
        if made.finish_reason is not None:
            iteration.update_from_finished_request(
                made.finish_reason,
                live.request_id,
                live.prompt_tokens,
                live.max_tokens,
                stats,
                live.cached_tokens,
            )
            iteration.max_num_generation_tokens_iter.append(stats.num_generation_tokens)
            iteration.n_params_iter.append(1)  # choices are separate requests here
            self.lora.request_finished(made.request_id, live.lora_name)

    def end(self, step: Any) -> None:
        at = self._at
        at.steps += 1
        if step.outputs:
            self._step_tokens[step.engine_index].observe(at.tokens() - self._before)
        if step.scheduler_stats is not None:
            self.lora.update_scheduler_stats(step.scheduler_stats)
            at.add(step.scheduler_stats)
        if at.steps >= _STEPS_TOGETHER:
            self._hand_over(step.engine_index)

    def flush(self) -> None:
        """Bring vLLM's metrics up to date."""
        for rank, pending in self._pending.items():
            if pending.steps:
                self._hand_over(rank)

    def _hand_over(self, rank: int) -> None:
        at, self._pending[rank] = self._pending[rank], _Pending()
        for latency, count in at.latencies.items():
            _observe_many(self._logger.histogram_inter_token_latency[rank], latency, count)
        self._logger.record(at.scheduler, at.iteration, None, rank)


class _Pending:
    """Steps that vLLM's metrics have not been told of."""

    def __init__(self) -> None:
        self.steps = 0
        self.latencies: dict[float, int] = {}
        self.iteration = IterationStats()
        self.scheduler: Any = None

    def tokens(self) -> int:
        """Tokens computed, of prompts and answers."""
        return int(self.iteration.prompt_token_stats.computed + self.iteration.num_generation_tokens)

    def add(self, stats: Any) -> None:
        """The latest of what stands, the sum of what happened."""
        if (earlier := self.scheduler) is not None:
            _add_counts(stats.prefix_cache_stats, earlier.prefix_cache_stats)
            if stats.connector_prefix_cache_stats is None:
                stats.connector_prefix_cache_stats = earlier.connector_prefix_cache_stats
            elif earlier.connector_prefix_cache_stats is not None:
                _add_counts(stats.connector_prefix_cache_stats, earlier.connector_prefix_cache_stats)
            stats.kv_cache_eviction_events = [*earlier.kv_cache_eviction_events, *stats.kv_cache_eviction_events]
        self.scheduler = stats
        if any(getattr(stats, name) is not None for name in _NOT_ADDABLE):
            self.steps = _STEPS_TOGETHER


class _Ignored:
    def observe(self, value: float) -> None:
        """Told once for several steps; see `_StepMetrics`."""


def _add_counts(into: Any, more: Any) -> None:
    """Cache statistics of an earlier step, added to those of a later one."""
    for name in ("requests", "queries", "hits", "preempted_requests", "preempted_queries", "preempted_hits"):
        setattr(into, name, getattr(into, name) + getattr(more, name))
    for source, hits in more.hits_by_source.items():
        into.hits_by_source[source] = into.hits_by_source.get(source, 0) + hits


def _observe_many(histogram: Any, value: float, count: int) -> None:
    """`count` times `histogram.observe(value)`, which `prometheus_client` has no call for."""
    histogram.observe(value)
    if count > 1:
        bucket = bisect_left(histogram._upper_bounds, value)
        histogram._buckets[bucket].inc(count - 1)
        histogram._sum.inc(value * (count - 1))
