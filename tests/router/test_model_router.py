"""One model's router among real workers on the planes."""

import asyncio
import logging

import pytest

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.protocols.engine import Routing
from dynamo.router import model_router as module
from dynamo.router.config import KvRouterConfig, LoadThresholdConfig, RouterConfig
from dynamo.router.model_router import ModelRouter
from dynamo.router.stats import TIMED_EVERY
from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import InvalidArgument, RouterQueueLimitExceeded, WorkerOverloaded, WorkerUnavailable
from dynamo.runtime.events import create_publisher
from dynamo.runtime.instances import instance_record
from tests.router.fleet import ENDPOINT, Asked, Worker, eventually, make_card, prompt, routing

BUSY = {"active_prefill_tokens_threshold": 100}


@pytest.fixture
async def two(runtime):
    """Two workers."""
    return [await Worker(runtime, i).join() for i in (1, 2)]


def workers(router) -> list[tuple[int, int]]:
    return sorted(router.scheduler.load.workers)


# --- what it routes by


async def test_a_request_goes_where_its_prefix_is(runtime, two):
    async with routing(runtime) as router:
        await two[1].store(prompt(7, 8))
        hashes = sequence_hashes(compute_block_hash_for_seq(prompt(7), 16))
        await eventually(lambda: router.index.find(hashes))
        asked = Asked(router, prompt(7), explain=True)
        assert asked.worker == 2
        assert asked.decision.overlap.device == 8
        assert asked.decision.hit_rate == pytest.approx(0.8)
        assert [c["worker_id"] for c in asked.decision.explanation["candidates"]] == [2, 1]
        assert router.stats.kv_hit_rate.count == 1
        assert router.stats.selected_cached_tokens == 128


async def test_load_decides_among_strangers_and_ends_at_zero(runtime, two):
    async with routing(runtime) as router:
        tickets = [Asked(router, prompt(i), f"r{i}") for i in range(10)]
        assert sorted(asked.worker for asked in tickets) == [1] * 5 + [2] * 5
        for asked in tickets[:5]:
            asked.ticket.first_token()
            asked.ticket.first_token()
            asked.ticket.output_block()
        for asked in tickets:
            asked.ticket.free(output_tokens=5)
            asked.ticket.free()
        assert router.scheduler.load.idle
        assert router.stats.output_sequence_tokens.count == 10
        assert router.stats.time_to_first_token_seconds.count == 5


async def test_two_requests_with_one_id_are_two(runtime, two):
    async with routing(runtime) as router:
        one, other = Asked(router, prompt(1), "same"), Asked(router, prompt(2), "same")
        assert len(router.scheduler.load.bookings) == 2
        one.ticket.free()
        assert len(router.scheduler.load.bookings) == 1
        other.ticket.free()
        assert router.scheduler.load.idle


async def test_without_events_it_guesses_from_what_it_sent(runtime, two):
    async with routing(runtime, make_card(events=False), use_kv_events=False) as router:
        first = Asked(router, prompt(1))
        first.ticket.free()
        again = Asked(router, prompt(1))
        assert again.worker == first.worker
        assert again.decision.overlap.device == 10
        assert router.status()["cache"]["known_by"] == "what is sent"
        assert not router.silent


async def test_with_prediction_a_prefix_counts_before_the_worker_says_so(runtime, two):
    async with routing(runtime, router_predicted_ttl_secs=30.0) as router:
        first = Asked(router, prompt(1))
        first.ticket.free()
        again = Asked(router, prompt(1))
        assert again.decision.overlap.device == 10
        assert again.worker == first.worker


async def test_a_pin_goes_to_the_worker_it_names(runtime, two):
    async with routing(runtime) as router:
        for worker_id in (1, 2, 2, 1):
            asked = Asked(router, prompt(1), routing=Routing(backend_instance_id=worker_id))
            assert asked.worker == worker_id
        asked = Asked(router, prompt(1), routing=Routing(backend_instance_id=99))
        assert isinstance(asked.error, WorkerUnavailable)


async def test_adapters_and_tenants_have_prefixes_of_their_own(runtime, two):
    async with routing(runtime, use_kv_events=False) as router:
        Asked(router, prompt(1))
        for other in (Routing(lora_name="a"), Routing(cache_salt="tenant")):
            assert Asked(router, prompt(1), routing=other).decision.best_overlap_blocks == 0
        assert Asked(router, prompt(1)).decision.best_overlap_blocks == 10


async def test_what_routing_costs_is_measured_now_and_then(runtime, two):
    async with routing(runtime) as router:
        for i in range(2 * TIMED_EVERY + 1):
            Asked(router, prompt(1), f"r{i}")
        stats = router.stats
        for each in (stats.find_matches_ms, stats.scheduling_ms, stats.total_ms):
            assert each.count == 3
        for each in (stats.block_hashing_ms, stats.seq_hashing_ms):
            assert each.count == 1
        assert stats.total_ms.sum >= stats.scheduling_ms.sum > stats.find_matches_ms.sum > 0


async def test_an_override_that_cannot_be_meant_is_refused_before_routing(runtime, two):
    async with routing(runtime) as router:
        with pytest.raises(InvalidArgument, match="router_config_override"):
            Asked(router, prompt(1), router_config_override={"router_temperature": -1})


# --- who is there


async def test_workers_come_and_go(runtime, two):
    async with routing(runtime) as router:
        assert workers(router) == [(1, 0), (2, 0)]
        asked = Asked(router, prompt(1), routing=Routing(backend_instance_id=2))
        await two[1].leave()
        await eventually(lambda: workers(router) == [(1, 0)])
        assert router.scheduler.load.idle
        asked.ticket.free()
        third = await Worker(runtime, 3).join()
        await eventually(lambda: workers(router) == [(1, 0), (3, 0)])
        await third.leave()


async def test_ranks_are_those_of_the_card(runtime):
    card = make_card(data_parallel_size=2, data_parallel_start_rank=4)
    await Worker(runtime, 1, card).join()
    async with routing(runtime, card) as router:
        assert workers(router) == [(1, 4), (1, 5)]
        asked = [Asked(router, prompt(i), f"r{i}") for i in range(2)]
        assert {a.decision.worker.dp_rank for a in asked} == {4, 5}
        pinned = Asked(router, prompt(9), routing=Routing(backend_instance_id=1, dp_rank=5))
        assert pinned.decision.worker == WorkerKey(1, 5)
        by_rank = Asked(router, prompt(9), routing=Routing(dp_rank=4))
        assert by_rank.decision.worker == WorkerKey(1, 4)
        with pytest.raises(InvalidArgument, match="dp_rank 9 is no worker's"):
            Asked(router, prompt(9), routing=Routing(dp_rank=9))


async def test_a_card_published_again_gives_new_limits_and_taints(runtime, two):
    async with routing(runtime) as router:
        await two[0].publish_card(make_card(taints={"eu"}, total_kv_blocks=77))
        at = router.scheduler.load.position[WorkerKey(1)]
        await eventually(lambda: router.scheduler.load.limits[at].taints == {"eu"})
        assert router.scheduler.load.limits[at].total_blocks == 77


async def test_workers_of_another_model_are_left_out(runtime, two):
    await Worker(runtime, 3, make_card(name="other")).join()
    async with routing(runtime) as router:
        assert workers(router) == [(1, 0), (2, 0)]


async def test_a_worker_that_failed_a_moment_ago_gets_nothing_new(runtime, two):
    client = await runtime.endpoint(ENDPOINT).client()
    async with routing(runtime) as router:
        client.report_failure(1)
        assert {Asked(router, prompt(i), f"r{i}").worker for i in range(6)} == {2}
        assert workers(router) == [(1, 0), (2, 0)]
        assert [w["suspended"] for w in router.status()["workers"]] == [True, False]


async def test_a_worker_that_joined_this_moment_can_be_asked_for(runtime):
    async with routing(runtime) as router:
        await Worker(runtime, 5).join()
        await eventually(lambda: Asked(router, prompt(1)).worker == 5)


async def test_without_workers_a_request_fails_at_once(runtime):
    async with routing(runtime) as router:
        asked = Asked(router, prompt(1))
        assert isinstance(asked.error, WorkerUnavailable)
        assert "no worker has joined" in router.status()["warnings"]
        assert not router._tickets


# --- loud refusals


@pytest.mark.parametrize("size", [None, 0])
async def test_without_a_block_size_it_refuses_to_start(runtime, size):
    with pytest.raises(InvalidArgument, match=r"--router-mode kv cannot work for m: .*kv_cache_block_size"):
        ModelRouter(runtime, runtime.endpoint(ENDPOINT), make_card(block_size=size), RouterConfig())


async def test_a_worker_without_events_is_told_loudly_and_shown(runtime, caplog):
    await Worker(runtime, 0xAB, make_card(events=False)).join()
    with caplog.at_level(logging.ERROR):
        async with routing(runtime, make_card(events=False)) as router:
            assert "does not know what worker ab, rank 0 has cached: it publishes no KV events" in caplog.text
            assert "--no-router-kv-events" in caplog.text
            assert router.silent.keys() == {WorkerKey(0xAB)}
            assert any("publishes no KV events" in line for line in router.status()["warnings"])
            assert Asked(router, prompt(1)).worker == 0xAB


async def test_a_block_size_other_than_the_routers_is_told_loudly(runtime, caplog):
    card = make_card(block_size=32)
    await Worker(runtime, 1, card).join()
    with caplog.at_level(logging.ERROR):
        router = ModelRouter(runtime, runtime.endpoint(ENDPOINT), card, RouterConfig(), block_size=16)
        await router.start()
        assert "its KV blocks have 32 tokens, this router's 16" in caplog.text
        await router.close()


async def test_a_policy_file_that_cannot_be_read_stops_the_start(runtime):
    config = RouterConfig(config=KvRouterConfig(router_policy_config="/nowhere.yaml"))
    with pytest.raises(ValueError, match=r"router_policy_config: /nowhere\.yaml cannot be read"):
        ModelRouter(runtime, runtime.endpoint(ENDPOINT), make_card(), config)


@pytest.mark.parametrize("value", ["0", "-3", "soon"])
async def test_a_queue_timeout_that_cannot_be_meant_stops_the_start(runtime, monkeypatch, value):
    monkeypatch.setenv("DYN_ROUTER_QUEUE_TIMEOUT_SECS", value)
    with pytest.raises(ValueError, match="DYN_ROUTER_QUEUE_TIMEOUT_SECS"):
        ModelRouter(runtime, runtime.endpoint(ENDPOINT), make_card(), RouterConfig())


# --- queue and overload


async def test_a_request_waits_for_room_and_goes_with_a_first_token(runtime, two):
    async with routing(runtime, router_queue_threshold=1.0) as router:
        first = [Asked(router, prompt(i, 40), f"r{i}") for i in range(2)]
        waiting = Asked(router, prompt(5), "w")
        assert waiting.decision is None
        assert router.queue.pending == 1
        first[0].ticket.first_token()
        assert waiting.worker == first[0].worker
        assert waiting.decision.queued_ms > 0


async def test_a_request_goes_when_a_worker_joins(runtime, two):
    async with routing(runtime, router_queue_threshold=1.0) as router:
        for i in range(2):
            Asked(router, prompt(i, 40), f"r{i}")
        waiting = Asked(router, prompt(5), "w")
        await Worker(runtime, 3).join()
        await eventually(lambda: waiting.worker == 3)


async def test_a_request_cancelled_while_queued_never_goes(runtime, two):
    async with routing(runtime, router_queue_threshold=1.0) as router:
        first = [Asked(router, prompt(i, 40), f"r{i}") for i in range(2)]
        waiting = Asked(router, prompt(5), "w")
        waiting.ticket.cancel()
        for asked in first:
            asked.ticket.cancel()
        assert waiting.decision is None
        assert waiting.error is None
        assert router.scheduler.load.idle
        assert not router._tickets


async def test_a_queued_request_ends_at_its_deadline(runtime, two, monkeypatch):
    monkeypatch.setenv("DYN_ROUTER_QUEUE_TIMEOUT_SECS", "0.1")
    async with routing(runtime, router_queue_threshold=1.0) as router:
        for i in range(2):
            Asked(router, prompt(i, 40), f"r{i}")
        waiting = [Asked(router, prompt(5), f"w{i}") for i in range(3)]
        await eventually(lambda: all(asked.error is not None for asked in waiting))
        assert isinstance(waiting[0].error, RouterQueueLimitExceeded)
        assert waiting[0].error.limit_kind == "wait_seconds"
        assert router.queue.pending == 0


async def test_a_policy_class_comes_from_the_requests_metadata(runtime, two, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("policy_classes: [{name: a, policy_family: a}, {name: b, policy_family: b}]")
    async with routing(runtime, router_policy_config=str(path)) as router:
        Asked(router, prompt(1), metadata={"policy-class": "b"})
        assert router.queue.classes["b"].received == 1


async def test_when_all_are_busy_a_request_is_refused(runtime, two):
    async with routing(runtime, thresholds=BUSY) as router:
        first = [Asked(router, prompt(i), f"r{i}") for i in range(2)]
        refused = Asked(router, prompt(5), "x")
        assert isinstance(refused.error, WorkerOverloaded)
        assert sorted(router.status()["overload"]["busy_workers"]) == [1, 2]
        router.thresholds = LoadThresholdConfig()
        assert Asked(router, prompt(5), "y").worker
        first[0].ticket.free()
        assert router.stats.errors == 1


async def test_what_workers_report_counts(runtime, two):
    thresholds = {"active_decode_blocks_threshold": 0.5}
    async with routing(runtime, thresholds=thresholds) as router:

        def report() -> bool:
            for worker in two:
                worker.report(active_decode_blocks=600, running_requests=3)
            return len(router.overload.busy_workers()) == 2

        await eventually(report)
        assert isinstance(Asked(router, prompt(1)).error, WorkerOverloaded)
        assert router.status()["workers"][0]["reported"]["active_decode_blocks"] == 600
        assert router.status()["workers"][0]["reported_less_booked"]["decode_blocks"] == 600


async def test_a_worker_that_lies_is_clamped_and_shown(runtime, two):
    async with routing(runtime) as router:

        def report() -> bool:
            two[0].report(active_decode_blocks=-5, active_prefill_tokens=1 << 60)
            return router.reports.corrected[WorkerKey(1)] > 3

        await eventually(report)
        assert any("numbers that cannot be" in line for line in router.status()["warnings"])
        assert Asked(router, prompt(1)).worker == 2


async def test_load_reports_that_are_none_are_counted(runtime, two):
    publisher = await create_publisher(runtime, ENDPOINT, "kv_metrics")
    async with routing(runtime) as router:

        def report() -> bool:
            publisher.publish({"worker_id": "one"})
            return router._load_feed.undecodable > 0

        await eventually(report)
    await publisher.close()


# --- sessions


def session(name: str, final: bool = False) -> dict:
    context = {"session_id": name}
    if final:
        context["session_final"] = "true"
    return {"agent_context": context}


async def test_a_session_stays_with_its_worker(runtime, two):
    async with routing(runtime, affinity=60) as router:
        home = Asked(router, prompt(1), **session("s")).worker
        for i in range(5):  # though the other one has nothing to do
            assert Asked(router, prompt(10 + i), f"r{i}", **session("s")).worker == home
        assert Asked(router, prompt(30), "other").worker != home
        assert router.status()["affinity"]["sessions"] == 1


async def test_a_session_moves_when_its_worker_left(runtime, two):
    async with routing(runtime, affinity=60) as router:
        home = Asked(router, prompt(1), **session("s")).worker
        await two[home - 1].leave()
        await eventually(lambda: len(workers(router)) == 1)
        assert Asked(router, prompt(1), **session("s")).worker == 3 - home
        assert router.affinity.moved == 1


async def test_a_soft_session_goes_elsewhere_while_its_worker_is_full_and_comes_back(runtime, two):
    async with routing(runtime, affinity=60, mode="soft") as router:
        first = Asked(router, prompt(1), **session("s"))
        long = Asked(router, prompt(2, 200), "long", routing=Routing(backend_instance_id=first.worker))
        assert Asked(router, prompt(3), "r3", **session("s")).worker != first.worker
        long.ticket.free()
        assert Asked(router, prompt(4), "r4", **session("s")).worker == first.worker


async def test_a_pin_wins_over_the_session(runtime, two):
    async with routing(runtime, affinity=60) as router:
        home = Asked(router, prompt(1), **session("s")).worker
        pinned = Asked(router, prompt(2), routing=Routing(backend_instance_id=3 - home), **session("s"))
        assert pinned.worker == 3 - home
        assert Asked(router, prompt(3), **session("s")).worker == home


async def test_a_final_request_ends_the_session(runtime, two):
    async with routing(runtime, affinity=60) as router:
        home = Asked(router, prompt(1), **session("s")).worker
        assert Asked(router, prompt(2), **session("s", final=True)).worker == home
        assert len(router.affinity) == 0


# --- several routers, and long lives


async def test_routers_of_one_endpoint_share_their_load(runtime, two):
    async with (
        routing(runtime, router_replica_sync=True) as here,
        routing(runtime, router_replica_sync=True) as there,
    ):
        await eventually(lambda: here.sync.routers == there.sync.routers == 1)
        asked = Asked(here, prompt(1, 30))
        await eventually(lambda: sum(there.scheduler.load.requests) == 1)
        assert Asked(there, prompt(2)).worker != asked.worker
        asked.ticket.first_token()
        await eventually(lambda: there.scheduler.load.prefill_tokens == here.scheduler.load.prefill_tokens)
        asked.ticket.free()
        await eventually(lambda: here.scheduler.load.requests == there.scheduler.load.requests)
        assert there.status()["replica_sync"]["routers"] == 1


async def test_a_request_that_lasts_long_is_not_taken_for_a_leak(runtime, two, monkeypatch, caplog):
    monkeypatch.setattr(module, "TICK_S", 0.02)
    async with routing(runtime, active_request_expiry_secs=0.05) as router:
        asked = Asked(router, prompt(1))
        leaked = router.request("leaked", preprocessed_request(), None)
        router.scheduler.book(leaked, router.scheduler.select(leaked, 0.0), router._loop.time())
        with caplog.at_level(logging.WARNING):
            await eventually(lambda: router.stats.leaked_bookings == 1)
        assert "1 bookings of m were never freed and are dropped, first leaked" in caplog.text
        await asyncio.sleep(0.2)
        assert list(router.scheduler.load.bookings) == [asked.ticket.request.request_id]


def preprocessed_request():
    from dynamo.llm.protocols.engine import PreprocessedRequest

    return PreprocessedRequest("m", prompt(9))


async def test_closing_tells_those_that_wait(runtime, two):
    async with routing(runtime, router_queue_threshold=1.0) as router:
        for i in range(2):
            Asked(router, prompt(i, 40), f"r{i}")
        waiting = Asked(router, prompt(5), "w")
    assert isinstance(waiting.error, WorkerUnavailable)
    assert "closing" in waiting.error.message
    await router.close()


async def test_a_decision_is_in_the_log_when_asked_for(runtime, two, caplog):
    async with routing(runtime, router_policy="linear") as router:
        with caplog.at_level(logging.DEBUG, logger="dynamo.router.model_router"):
            Asked(router, prompt(1), "shown")
    assert "request shown of m" in caplog.text
    assert "'policy': 'linear'" in caplog.text


async def test_two_thousand_workers_join_and_leave_at_once(runtime):
    card, address = make_card(), runtime.endpoint(ENDPOINT).address
    async with routing(runtime) as router:
        discovery, ids = runtime.discovery, range(1, 2001)
        for worker_id in ids:
            await discovery.put(address.instance_key(worker_id), instance_record(address, worker_id, "127.0.0.1:9"))
            await discovery.put(address.card_key(worker_id), card.to_json())
        await eventually(lambda: len(router.scheduler.load.workers) == 2000, 30)
        asked = [Asked(router, prompt(i), f"r{i}") for i in range(100)]
        assert len({each.worker for each in asked}) == 100
        for worker_id in ids[:-1]:
            await discovery.delete(address.instance_key(worker_id))
            await discovery.delete(address.card_key(worker_id))
        await eventually(lambda: workers(router) == [(2000, 0)], 30)
        for each in asked:
            each.ticket.free()
        assert router.scheduler.load.idle


async def test_a_token_that_is_none_deep_in_a_prompt_is_refused_and_leaves_nothing(runtime, two):
    async with routing(runtime) as router:
        known = list(range(1024))
        await two[0].store(known)
        await eventually(lambda: router.index.blocks(WorkerKey(1)) == {"device": 64})
        Asked(router, known).ticket.free()  # the first is hashed whole, to see what that costs
        asked = Asked(router, [*known[:700], 1 << 32, *known])
        assert isinstance(asked.error, InvalidArgument)
        assert router.ticket(asked.ticket.request.request_id) is None
        assert router.scheduler.load.idle
