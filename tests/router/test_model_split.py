"""Does the pool that can take a prompt take it, and the policy decide where both can?"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from dynamo.llm.model_card import WorkerType
from dynamo.router.config import KvRouterConfig, LoadThresholdConfig, RouterConfig
from dynamo.router.model_router import ModelRouter
from dynamo.router.model_split import ModelSplit
from dynamo.router.split import Split
from dynamo.router.split_settings import SplitSettings, changed
from dynamo.router.transfer_time import TransferTime
from dynamo.router.types import RouteRequest
from dynamo.runtime.errors import WorkerOverloaded
from dynamo.runtime.selection import RouterMode
from tests.router.fleet import ENDPOINT, Worker, eventually, make_card, preprocessed, prompt

PREFILL, DECODE = 1, 2
BUSY = LoadThresholdConfig(active_prefill_tokens_threshold=100)
LONG = {"conditional_disagg_enabled": True, "conditional_disagg_eff_isl_threshold": 50}


class Pair:
    """A prefill and a decode worker, a router for each, and what stands between them."""

    def __init__(self, prefill: ModelRouter, decode: ModelRouter, config: KvRouterConfig) -> None:
        self.prefill, self.decode = prefill, decode
        self.transfer = TransferTime()
        self.split = ModelSplit(prefill, decode, config, self.transfer.seconds)

    def requests(self, name: str = "r", tokens: list[int] | None = None, **more: Any) -> tuple[RouteRequest, ...]:
        asked = preprocessed(tokens or prompt(7), **more)
        here = self.decode.request(name, asked)
        return here, self.prefill.request(f"{name}-prefill", asked, hashes=here.sequence_hashes)

    def decide(self, **more: Any) -> Split:
        here, there = self.requests(**more)
        return self.split.decide(here, there)

    def occupy(self, router: ModelRouter, name: str = "busy") -> None:
        """Leave a prompt of 160 tokens to compute."""
        router.route(router.request(name, preprocessed(prompt(9))), lambda decision: None, lambda error: None)


@asynccontextmanager
async def pair(runtime, *, prefill: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Pair]:
    """`prefill` are settings of its router only."""
    card = make_card()
    roles = (
        (PREFILL, "dynamo.prefill.generate", msgspec.structs.replace(card, worker_type=WorkerType.Prefill)),
        (DECODE, ENDPOINT, msgspec.structs.replace(card, worker_type=WorkerType.Decode)),
    )
    routers = []
    async with AsyncExitStack() as stack:
        for number, endpoint, of in roles:
            await Worker(runtime, number, of, endpoint=endpoint).join()
            more = prefill or {} if number == PREFILL else {}
            config = RouterConfig(RouterMode.KV, KvRouterConfig(**{**settings, **more}), session_affinity_ttl_secs=60)
            router = ModelRouter(runtime, runtime.endpoint(endpoint), of, config)
            await router.start()
            stack.push_async_callback(router.close)
            routers.append(router)
        yield Pair(routers[0], routers[1], routers[1].config)


async def test_every_prompt_travels_unless_asked_otherwise(runtime):
    async with pair(runtime) as two:
        split = two.decide()
        assert (split.remote, split.cause, two.split.policy) == (True, "always", "always")


async def test_the_policy_decides_where_both_pools_can(runtime):
    async with pair(runtime, **LONG) as two:
        assert two.decide().cause == "long"
        assert two.decide(tokens=prompt(7, 2)).cause == "short"


async def test_blocks_at_a_prefill_worker_are_not_counted_as_they_are_soon_elsewhere(runtime):
    async with pair(runtime) as two:
        for router in (two.prefill, two.decode):
            two.occupy(router)
        assert two.prefill.scheduler.load.decode_blocks == [0]
        assert two.decode.scheduler.load.decode_blocks == [10]


async def test_a_prompt_whose_prefill_worker_is_named_goes_there(runtime):
    async with pair(runtime, **LONG) as two:
        here, there = two.requests(tokens=prompt(7, 2))
        there.allowed = frozenset(two.prefill.scheduler.load.workers)
        split = two.split.decide(here, there)
        assert (split.remote, split.cause) == (True, "asked")


async def test_settings_can_be_exchanged(runtime):
    async with pair(runtime, **LONG) as two:
        fields = SplitSettings(eff_isl_threshold=1000).fields()
        two.split.configure(changed(two.split.config, fields))
        assert two.decide().cause == "short"
        two.split.configure(changed(two.split.config, {"conditional_disagg_enabled": False}))
        assert two.decide().cause == "always"


async def test_looking_books_and_counts_nothing(runtime):
    async with pair(runtime, **LONG) as two:
        for router in (two.prefill, two.decode):
            router.thresholds = BUSY
        two.occupy(two.prefill)
        two.decide()
        assert two.decode.scheduler.load.idle
        assert [router.stats.requests for router in (two.prefill, two.decode)] == [1, 0]
        assert [router.overload.refused for router in (two.prefill, two.decode)] == [0, 0]


async def test_a_prefill_pool_that_is_overloaded_leaves_the_prompt_to_decode(runtime):
    async with pair(runtime, **LONG) as two:
        two.prefill.thresholds = BUSY
        assert two.decide().remote
        two.occupy(two.prefill)
        split = two.decide()
        assert (split.remote, split.cause) == (False, "prefill_overloaded")
        assert "active_prefill_tokens_threshold 100" in split.reason


async def test_a_prefill_queue_that_is_full_leaves_the_prompt_to_decode(runtime, tmp_path):
    file = tmp_path / "classes.yaml"
    file.write_text("policy_classes: [{name: one, prefill_busy_threshold: 10, request_queue_limit_per_worker: 1}]")
    async with pair(runtime, prefill={"router_policy_config": str(file)}, **LONG) as two:
        two.occupy(two.prefill)
        assert two.decide().remote  # there is room to wait
        two.occupy(two.prefill, "waits")
        assert two.prefill.queue.pending == 1
        split = two.decide()
        assert (split.remote, split.cause) == (False, "prefill_overloaded")
        assert two.prefill.queue.classes["one"].rejected.total() == 0


async def test_a_prefill_pool_without_a_worker_that_may_leaves_the_prompt_to_decode(runtime):
    async with pair(runtime, **LONG) as two:
        two.prefill.scheduler.suspended.update(two.prefill.scheduler.load.workers)
        split = two.decide()
        assert (split.remote, split.cause) == (False, "prefill_unavailable")


async def test_a_decode_pool_that_is_overloaded_has_its_prompts_computed_elsewhere(runtime):
    async with pair(runtime, **LONG) as two:
        two.decode.thresholds = BUSY
        short = prompt(7, 2)
        assert not two.decide(tokens=short).remote
        two.occupy(two.decode)
        split = two.decide(tokens=short)
        assert (split.remote, split.cause) == (True, "decode_overloaded")


async def test_what_neither_pool_takes_is_refused_by_the_decode_workers_router(runtime):
    async with pair(runtime, **LONG) as two:
        for router in (two.prefill, two.decode):
            router.thresholds = BUSY
            two.occupy(router)
        here, there = two.requests()
        split = two.split.decide(here, there)
        assert (split.remote, split.cause) == (False, "neither")
        errors: list[Exception] = []
        two.decode.route(here, lambda decision: pytest.fail("it was sent"), errors.append)
        assert isinstance(errors[0], WorkerOverloaded)


async def test_without_a_decode_worker_nothing_is_computed_for_nobody(runtime):
    async with pair(runtime, **LONG) as two:
        two.decode.scheduler.suspended.update(two.decode.scheduler.load.workers)
        split = two.decide()
        assert (split.remote, split.cause) == (False, "decode_unavailable")


async def test_the_effective_length_is_that_of_the_sessions_own_worker(runtime):
    async with pair(runtime, **LONG) as two:
        holder = Worker(runtime, 3, two.decode._card)
        await holder.join()
        await eventually(lambda: len(two.decode.scheduler.load.workers) == 2)
        await holder.store(prompt(7))
        hashes = two.requests()[0].sequence_hashes
        assert two.decode.index is not None
        await eventually(lambda: two.decode.index.find(hashes))
        assert two.decide().cause == "short"
        session = {"agent_context": {"session_id": "s"}}
        elsewhere = next(worker for worker in two.decode.scheduler.load.workers if worker.worker_id == DECODE)
        assert two.decode.affinity is not None
        two.decode.affinity.bind("s", elsewhere, asyncio.get_running_loop().time())
        here, there = two.requests(**session)
        assert two.split.decide(here, there).cause == "long"
        assert here.allowed is None  # what was asked for is not changed by the look


# --- how long KV travels


def test_transfers_are_learnt_from_what_decode_workers_say():
    transfer = TransferTime()
    before = transfer.seconds(4000)
    for tokens in (1000, 2000, 4000, 8000) * 20:
        transfer.see({"kv_transfer": {"tokens": tokens, "bytes": tokens, "seconds": 0.05 + tokens * 1e-4}})
    assert before < 0.05
    assert transfer.seconds(4000) == pytest.approx(0.45, rel=0.1)
    assert transfer.seen == 80


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"kv_transfer": None},
        {"kv_transfer": {"tokens": 5}},
        {"kv_transfer": {"tokens": "5", "seconds": 1.0}},
        {"kv_transfer": {"tokens": 5, "seconds": float("nan")}},
        {"kv_transfer": {"tokens": -5, "seconds": 1.0}},
    ],
)
def test_nonsense_teaches_nothing(said: dict[str, Any]):
    transfer = TransferTime()
    before = transfer.seconds(1000)
    transfer.see(said)
    assert (transfer.seen, transfer.seconds(1000)) == (0, before)
