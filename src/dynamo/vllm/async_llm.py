"""How is vLLM driven through its public `AsyncLLM`?

The fallback where `dynamo.vllm.engine_core` does not know the installed version. It costs two to three times the
CPU per token in this process: vLLM keeps a queue and a task for each request. What one turn of the event loop
brings is still handed on as one batch.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import StatLoggerBase

from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PromptTokensDetails
from dynamo.llm.protocols.engine import FinishReason as Finish
from dynamo.vllm import guard, logprobs
from dynamo.vllm.driver import PARENT_ENV, DriverEvents, DriverRequest, EngineLoad
from dynamo.vllm.sampling import engine_error, invalid, is_refusal

_STOP_TIMEOUT_S = 10.0  # for the core to end by itself; then vLLM kills it
_HEALTH_INTERVAL_S = 0.5  # AsyncLLM tells of a death only to those who wait for tokens
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "cancelled", "repetition": "stop"}


class AsyncLLMDriver:
    """One vLLM engine behind `AsyncLLM`. State is owned by the event loop's thread."""

    name = "async"

    def __init__(self, config: Any, log_stats: bool = True) -> None:
        """`config` is vLLM's `VllmConfig`; `log_stats` asks for the scheduler's numbers each step."""
        self._config = config
        self._log_stats = log_stats
        self._engine: Any = None
        self._starting: asyncio.Future[Any] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._batch: list[tuple[str, EngineOutput]] = []
        self._dead: str | None = None
        self._stopped = False
        self._sent = 0

    async def start(self, events: DriverEvents) -> None:
        self._events = events
        self._loop = asyncio.get_running_loop()
        os.environ[PARENT_ENV] = str(os.getpid())
        self._starting = asyncio.ensure_future(asyncio.to_thread(self._make))
        self._engine = await asyncio.shield(self._starting)
        self._watch = asyncio.create_task(self._watch_health(), name="vllm-health")

    def _make(self) -> Any:
        if hasattr(self._config.profiler_config, "ignore_frontend"):
            # The engine is what is to be profiled; torch's profiler in this process has crashed it.
            self._config.profiler_config.ignore_frontend = True
        return AsyncLLM(
            self._config,
            guard.guarded(Executor.get_class(self._config)),
            log_stats=self._log_stats,
            log_requests=False,
            stat_loggers=[_load_logger(self._on_stats)] if self._log_stats else None,
        )

    def submit(self, request: DriverRequest) -> None:
        self._streams[request.request_id] = asyncio.create_task(self._stream(request))

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if (stream := self._streams.pop(request_id, None)) is not None:
                stream.cancel()  # AsyncLLM aborts when its generator is closed
                self._batch = [(rid, output) for rid, output in self._batch if rid != request_id]

    def dead(self) -> str | None:
        return self._dead

    async def control(self, verb: str, *args: Any) -> Any:
        if self._engine is None or self._dead:
            raise RuntimeError("the engine is not running")
        if verb == "profile":
            start, *rest = args
            return await (self._engine.start_profile(*rest) if start else self._engine.stop_profile())
        return await getattr(self._engine, verb)(*args)

    def flush_metrics(self) -> None:
        """AsyncLLM keeps its own up to date."""

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._starting is not None and not self._starting.done():
            await guard.abandon(self._starting)
            if self._starting.done() and self._starting.exception() is None:
                self._engine = self._starting.result()  # it was quicker
        if self._watch is not None:
            self._watch.cancel()
        streams = list(self._streams.values())
        self.abort(list(self._streams))
        if streams:
            await asyncio.wait(streams, timeout=_STOP_TIMEOUT_S)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown, _STOP_TIMEOUT_S)

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            if self._engine.errored:
                self._died()
                return

    def _died(self) -> None:
        if self._dead is None and not self._stopped:
            self._dead = "vLLM's engine core or one of its workers is gone"
            self._events.on_engine_death(self._dead)

    async def _stream(self, request: DriverRequest) -> None:
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": request.token_ids}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        self._sent += 1
        request_id = request.request_id
        this = asyncio.current_task()
        outputs = self._engine.generate(
            prompt,
            request.sampling_params,
            str(self._sent),  # ours may come again while vLLM still forgets an aborted one
            lora_request=request.lora_request,
            priority=request.priority,
            data_parallel_rank=request.dp_rank,
        )
        state = _Choice(request)
        try:
            async for made in outputs:
                if self._streams.get(request_id) is not this:
                    return
                if made.outputs[0].finish_reason == "error":
                    raise engine_error(state.is_guided and not state.generated)
                output = state.output(made)
                if made.finished:
                    del self._streams[request_id]
                self._push(request_id, output)
        except EngineDeadError:
            self._died()
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this request's caller
            if self._streams.get(request_id) is this:
                del self._streams[request_id]
                self._events.on_failed(request_id, invalid(error) if is_refusal(error) else error)
        finally:
            await outputs.aclose()

    def _push(self, request_id: str, output: EngineOutput) -> None:
        if not self._batch:
            self._loop.call_soon(self._flush)
        self._batch.append((request_id, output))

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if batch:
            self._events.on_step(batch)

    def _on_stats(self, rank: int, stats: Any) -> None:
        waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
        self._events.on_engine_load(
            EngineLoad(
                rank,
                stats.num_running_reqs,
                waiting,
                stats.kv_cache_usage,
                getattr(stats, "kv_connector_stats", None),
            )
        )


class _Choice:
    """Turns the stream of one request into outputs."""

    def __init__(self, request: DriverRequest) -> None:
        params = request.sampling_params
        self._logprobs: int | None = params.logprobs
        self._prompt_logprobs: int | None = params.prompt_logprobs
        self._prompt_tokens = len(request.token_ids)
        self._prompt_ids = request.token_ids
        self._eos = request.eos_token_ids
        self.is_guided = params.structured_outputs is not None
        self.generated = 0
        self._cumulative = 0.0

    def output(self, made: Any) -> EngineOutput:
        choice = made.outputs[0]
        token_ids = list(choice.token_ids)
        output = EngineOutput(token_ids=token_ids)
        if self.generated == 0 and self._prompt_logprobs is not None and made.prompt_logprobs:
            output.prompt_logprobs = [
                logprobs.from_mapping(entries, token_id, self._prompt_logprobs) if entries else None
                for token_id, entries in zip(self._prompt_ids, made.prompt_logprobs, strict=True)
            ]
        self.generated += len(token_ids)
        if self._logprobs is not None and choice.logprobs:
            positions = list(zip(token_ids, choice.logprobs, strict=True))
            output.log_probs = [float(entries[token_id].logprob) for token_id, entries in positions]
            if self._logprobs:
                output.top_logprobs = [logprobs.from_mapping(e, t, self._logprobs) for t, e in positions]
            self._cumulative += sum(output.log_probs)
            output.cum_log_probs = self._cumulative
        if made.finished:
            output.finish_reason = _FINISH.get(choice.finish_reason, "error")
            output.stop_reason = choice.stop_reason
            output.disaggregated_params = made.kv_transfer_params
            ended_by_eos = choice.stop_reason is None or choice.stop_reason in self._eos
            if choice.finish_reason == "stop" and ended_by_eos:
                output.finish_reason = "eos"
            output.completion_usage = CompletionUsage(
                self._prompt_tokens,
                self.generated,
                self._prompt_tokens + self.generated,
                PromptTokensDetails(made.num_cached_tokens or 0),
            )
        return output


def _load_logger(report: Callable[[int, Any], None]) -> Callable[[Any, int], StatLoggerBase]:
    """A vLLM stat logger that reports the scheduler's numbers of each step as (rank, stats)."""

    class LoadLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, config: Any, engine_index: int = 0) -> None:
            self._rank = engine_index

        def record(
            self,
            scheduler_stats: Any = None,
            iteration_stats: Any = None,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if scheduler_stats is not None:
                report(engine_idx, scheduler_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return LoadLogger
