"""How does the simulated engine run in real time?

One scheduler a data-parallel rank, each stepping on the event loop: plan a step, let its time pass, complete it.
With no time to pass (`speedup_ratio` 0) a step is one turn of the loop, so that sockets are served between steps.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dynamo.engine.contract import EngineCallbacks, EngineConfig, Submit
from dynamo.engine.handoff import DEFAULT_LEASE_S, Ledger
from dynamo.engine.takeover import Claims
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest
from dynamo.mocker.bootstrap import BootstrapServer
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import Scheduler, SchedulerConfig, Step
from dynamo.mocker.sequence import TokenSequence
from dynamo.mocker.split import Decode, Prefill, layout_of
from dynamo.mocker.timing import StepTiming
from dynamo.mocker.transfer import TransferTiming
from dynamo.runtime.errors import EngineShutdown, InvalidArgument

LOAD_INTERVAL_S = 0.02  # between two reports of the load while it changes at every step
HELD_S = 0.001  # until an instant engine looks again whether its callers have caught up


@dataclass(frozen=True, slots=True)
class MockerConfig:
    """One simulated worker. `startup_time_s` is how long it pretends to load weights. `bootstrap` is where a prefill
    worker listens for decode workers that start with it, as (host, port); `lease_s` how long it keeps a prompt's KV."""

    model: str
    served_model_name: str
    scheduler: SchedulerConfig
    timing: StepTiming
    data_parallel_size: int = 1
    startup_time_s: float = 0.0
    transfer: TransferTiming = TransferTiming()  # noqa: RUF009 - frozen
    lease_s: float = DEFAULT_LEASE_S
    bootstrap: tuple[str, int] | None = None


class _Rank:
    """A scheduler and its place on the event loop."""

    def __init__(self, engine: "MockerEngine", dp_rank: int, scheduler: Scheduler) -> None:
        self.dp_rank = dp_rank
        self.scheduler = scheduler
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._step: Step | None = None
        self._handle: asyncio.Handle | None = None
        self._load_at = 0.0

    def wake(self) -> None:
        """There is something to do: step if none is under way."""
        if self._handle is None:
            self._handle = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Complete the step whose time has passed, and begin the next."""
        engine, scheduler, now = self._engine, self.scheduler, self._loop.time()
        if engine.instant and engine.held():
            self._handle = self._loop.call_later(HELD_S, self._turn)
            return
        if self._step is not None:
            outputs = scheduler.complete(self._step, now)
            if outputs:
                engine.deliver(outputs)
            events = scheduler.take_kv_events()
            if events:
                engine.callbacks.on_kv_events(events, self.dp_rank)
        self._step = scheduler.schedule(now)
        if self._step is None:
            self._handle = None
            self.report_load(now)
            return
        if now >= self._load_at:
            self.report_load(now)
        duration = self._step.duration_s
        if duration:
            self._handle = self._loop.call_at(now + duration, self._turn)
        else:
            self._handle = self._loop.call_soon(self._turn)

    def report_load(self, now: float) -> None:
        """Say how busy this rank is."""
        self._load_at = now + LOAD_INTERVAL_S
        self._engine.callbacks.on_load(self.scheduler.load(self.dp_rank))

    def stop(self) -> None:
        """Take no more turns."""
        if self._handle is not None:
            self._handle.cancel()


class MockerEngine:
    """An `LLMEngine` without a model. `held` says whether callers are behind: an instant engine then waits for them,
    as it would fill their sockets faster than any real one could."""

    def __init__(self, config: MockerConfig, sampler: Sampler, held: Callable[[], bool] = lambda: False) -> None:
        self.config = config
        self.instant = config.timing.instant
        self.held = held
        self.callbacks: EngineCallbacks
        self.schedulers = [
            Scheduler(config.scheduler, config.timing, sampler) for _ in range(config.data_parallel_size)
        ]
        self._ranks: list[_Rank] = []
        self._role: Prefill | Decode | None = None
        self._roles: list[Prefill | Decode] = []  # all that it has had
        self._role_of: dict[str, Prefill | Decode] = {}  # request id → the half of a pair that it is done as
        self._bootstrap: BootstrapServer | None = None

    def bind_handoff(self, handoff: Ledger | Claims) -> None:
        """See `SplitEngine`."""
        self._role = self._make_role(handoff)

    def take_role(self, handoff: Ledger | Claims | None) -> Submit:
        """See `ChangingEngine`."""
        return partial(self._submit_as, None if handoff is None else self._make_role(handoff))

    def _make_role(self, handoff: Ledger | Claims) -> Prefill | Decode:
        config = self.config
        layout = layout_of(config.served_model_name, config.scheduler.block_size)
        role: Prefill | Decode
        if isinstance(handoff, Claims):
            role = Decode(self, handoff, layout, config.transfer)
        else:
            role = Prefill(self, handoff, layout, config.transfer, config.lease_s)
        self._roles.append(role)
        return role

    async def start(self, callbacks: EngineCallbacks) -> EngineConfig:
        """See `LLMEngine.start`."""
        await asyncio.sleep(self.config.startup_time_s)
        self.callbacks = callbacks
        self._ranks = [_Rank(self, rank, scheduler) for rank, scheduler in enumerate(self.schedulers)]
        limits = self.config.scheduler
        if isinstance(self._role, Prefill) and self.config.bootstrap is not None:
            self._bootstrap = self._role.bootstrap = BootstrapServer(self.config.lease_s)
            await self._bootstrap.start(*self.config.bootstrap)
        return EngineConfig(
            model=self.config.model,
            served_model_name=self.config.served_model_name,
            context_length=limits.context_length,
            kv_cache_block_size=limits.block_size,
            total_kv_blocks=limits.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            data_parallel_size=self.config.data_parallel_size,
            publishes_kv_events=limits.enable_prefix_caching,
            runtime_data={"engine": "mocker"},
            bootstrap_host=self._bootstrap.host if self._bootstrap else None,
            bootstrap_port=self._bootstrap.port if self._bootstrap else None,
        )

    def submit(self, request_id: str, request: PreprocessedRequest) -> None:
        """See `LLMEngine.submit`."""
        self._submit_as(self._role, request_id, request)

    def _submit_as(self, role: Prefill | Decode | None, request_id: str, request: PreprocessedRequest) -> None:
        if role is not None:
            role.submit(request_id, request)
            self._role_of[request_id] = role
        elif request.prefill_result is not None or request.bootstrap_info is not None:
            raise InvalidArgument(
                "this worker computes prompts itself; it cannot take over another worker's prefill", "prefill_result"
            )
        else:
            self.enqueue(request_id, request)

    # --- what a role asks of the engine

    def enqueue(
        self, request_id: str, request: PreprocessedRequest, *, keep: bool = False, transferred: int | None = None
    ) -> None:
        """Queue a request at the rank that routing names, else at the one with the fewest requests."""
        rank = self._rank_for(request)
        now = asyncio.get_running_loop().time()
        rank.scheduler.add(request_id, request, now, transferred=transferred)
        if keep:
            rank.scheduler.keep(request_id)
        rank.wake()

    def _rank_for(self, request: PreprocessedRequest) -> _Rank:
        if not self._ranks:
            raise EngineShutdown("the engine is not running")
        asked = request.routing.dp_rank if request.routing else None
        if asked is None:
            return min(self._ranks, key=lambda rank: len(rank.scheduler))
        if 0 <= asked < len(self._ranks):
            return self._ranks[asked]
        raise InvalidArgument(f"dp_rank: {asked} is not one of this worker's {len(self._ranks)} ranks", "dp_rank")

    def held_tokens(self, request: PreprocessedRequest) -> int:
        """How many of the prompt's tokens are in the cache of the rank that it would be queued at."""
        return self._rank_for(request).scheduler.held_tokens(request)

    def take_kept(self, request_id: str) -> Callable[[], None]:
        """What frees the blocks that a finished request kept."""
        for rank in self._ranks:
            sequence = rank.scheduler.take_kept(request_id)
            if sequence is not None:
                return partial(self._free_kept, rank, sequence)
        raise KeyError(request_id)

    def _free_kept(self, rank: _Rank, sequence: TokenSequence) -> None:
        rank.scheduler.free_kept(sequence)
        if self._ranks:
            rank.wake()

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request that no scheduler has."""
        self._role_of.pop(request_id, None)
        self.callbacks.on_error(request_id, error)

    def deliver(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        """Hand on what a step made."""
        if self._roles:
            outputs = [(request_id, output) for request_id, output in outputs if self._shows(request_id, output)]
        if outputs:
            self.callbacks.on_outputs(outputs)

    def _shows(self, request_id: str, output: EngineOutput) -> bool:
        """Whether the caller is to see it, once its role has looked at it."""
        role = self._role_of.get(request_id)
        shown = role is None or role.on_output(request_id, output)
        if output.finish_reason is not None:  # a role may keep the end back
            self._role_of.pop(request_id, None)
        return shown

    def abort(self, request_id: str) -> None:
        """See `LLMEngine.abort`."""
        role = self._role_of.pop(request_id, None)
        if role is not None:
            role.forget(request_id)
        for rank in self._ranks:
            if rank.scheduler.abort(request_id):
                rank.wake()
                return

    async def check_health(self) -> None:
        """Raises EngineShutdown once stopped."""
        if not self._ranks:
            raise EngineShutdown("the engine is not running")

    async def stop(self) -> None:
        """See `LLMEngine.stop`."""
        for role in self._roles:
            await role.close()
        for rank in self._ranks:
            rank.stop()
        self._ranks = []
