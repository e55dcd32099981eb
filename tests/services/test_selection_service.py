"""Choosing workers inside a Python program, without HTTP and without a runtime."""

import asyncio

import pytest

from dynamo.llm import InvalidArgument, KvRouterConfig, SelectionCacheConfig, SelectionService, SelectionServiceError
from tests.services.engines import BLOCK

PROMPT = list(range(14))


def worker(worker_id: int):
    return {"worker_id": worker_id, "model_name": "m", "endpoint": f"http://w{worker_id}", "block_size": BLOCK}


def ask(**more):
    return {"model_name": "m", "token_ids": PROMPT} | more


@pytest.fixture
async def service():
    """Two workers, by what is sent to them."""
    made = SelectionService(router_config=KvRouterConfig(use_kv_events=False, router_track_output_blocks=True))
    for worker_id in (1, 2):
        record = await made.upsert_worker(worker(worker_id))
        assert record["lifecycle"] == "schedulable"
    yield made
    await made.close()


async def test_a_request_from_its_selection_to_its_end(service):
    assert service.ready()["schedulable_workers"] == 2
    chosen = await service.select(ask(selection_id="a"))
    booked = await service.create_reservation({"selection_id": "a", "model_name": "m"})
    assert booked["worker_id"] == chosen["worker_id"]
    ((line,),) = [[x for x in g["loads"] if x["active_requests"]] for g in service.loads(model_name="m")]
    assert (line["potential_prefill_tokens"], line["potential_decode_blocks"]) == (14, 4)
    await service.prefill_complete("a")
    service.add_output_block("a")
    service.add_output_block("a", decay_fraction=0.5)
    await service.free_reservation("a")
    assert not any(line["active_requests"] for group in service.loads() for line in group["loads"])
    again = await service.select_and_reserve(ask())
    assert (again["worker_id"], again["overlap"]["gpu"]) == (chosen["worker_id"], 12)
    scores = await service.overlap_scores(ask())
    assert [(line["worker_id"], line["device_blocks"]) for line in scores["workers"]] == [(chosen["worker_id"], 3)]
    assert len(await service.potential_loads(ask())) == 2
    assert (await service.delete_worker(again["worker_id"]))["lifecycle"] == "unschedulable"
    assert [record["worker_id"] for record in service.list_workers()] == [3 - again["worker_id"]]


async def test_errors_have_a_kind_and_a_status(service):
    for request, kind, status in (
        (ask(model_name="n"), "not_ready", 503),
        (ask(allowed_worker_ids=[9]), "not_ready", 503),
    ):
        with pytest.raises(SelectionServiceError) as raised:
            await service.select(request)
        assert (raised.value.kind, raised.value.status_code) == (kind, status)
    with pytest.raises(SelectionServiceError, match="no reservation 'x'"):
        await service.free_reservation("x")
    with pytest.raises(SelectionServiceError) as raised:
        await service.create_reservation({"selection_id": "x", "model_name": "m"})
    assert raised.value.status_code == 404
    with pytest.raises(InvalidArgument, match="token_ids"):
        await service.select({"model_name": "m"})
    with pytest.raises(InvalidArgument, match="worker_id: is missing"):
        await service.upsert_worker({})


async def test_before_the_first_worker_and_after_the_end_it_says_so():
    service = SelectionService()
    assert service.ready() == {"ready": False, "schedulable_workers": 0, "workers": []}
    assert (service.list_workers(), service.loads()) == ([], [])
    with pytest.raises(SelectionServiceError, match="await upsert_worker first"):
        service.add_output_block("a")
    service.shutdown()
    service.shutdown()
    with pytest.raises(SelectionServiceError) as raised:
        await service.upsert_worker(worker(1))
    assert raised.value.kind == "shut_down"


async def test_whoever_waits_when_it_is_shut_down_is_told():
    config = KvRouterConfig(use_kv_events=False, router_queue_threshold=0.0)
    service = SelectionService(router_config=config)
    await service.upsert_worker(worker(1))
    await service.select_and_reserve(ask())
    waiting = asyncio.ensure_future(service.select_and_reserve(ask()))
    await asyncio.sleep(0)
    assert service.loads()[0]["pending_count"] == 1
    service.shutdown()
    with pytest.raises(SelectionServiceError) as raised:
        await waiting
    assert raised.value.status_code == 503
    await service.close()


async def test_selections_are_kept_within_bounds():
    cache = SelectionCacheConfig(max_entries=2)
    service = SelectionService(selection_cache=cache, router_config=KvRouterConfig(use_kv_events=False))
    await service.upsert_worker(worker(1))
    for selection_id in "abc":
        await service.select(ask(selection_id=selection_id))
    with pytest.raises(SelectionServiceError, match="nothing was selected as 'a'"):
        await service.create_reservation({"selection_id": "a", "model_name": "m"})
    await service.create_reservation({"selection_id": "c", "model_name": "m"})
    await service.close()


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="ttl_secs must be above 0"):
        SelectionCacheConfig(ttl_secs=0)
    with pytest.raises(ValueError, match="session_affinity_ttl_secs must be between 1"):
        SelectionService(session_affinity_ttl_secs=0)
    with pytest.raises(ValueError, match=r"conditional_disagg_enabled.*one pool"):
        SelectionService(router_config=KvRouterConfig(conditional_disagg_enabled=True))
    with pytest.raises(ValueError, match="indexer_threads"):
        SelectionService(indexer_threads=0)
