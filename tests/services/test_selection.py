"""The selection service as a process, asked as a gateway asks it."""

import threading
import time

import pytest

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from tests.services.engines import BLOCK, stored
from tests.services.processes import eventually, refused

PROMPT = list(range(14))
SELECT = "dynamo.select_service"


def worker(engine, worker_id: int, **more):
    """What `POST /workers` takes of a worker that is complete."""
    body = {
        "worker_id": worker_id,
        "model_name": "m",
        "endpoint": f"http://w{worker_id}:8000",
        "kv_events_endpoint": engine.endpoint,
        "block_size": BLOCK,
        "total_kv_blocks": 100,
        "max_num_batched_tokens": 64,
    }
    if engine.replay_endpoint is not None:
        body["replay_endpoint"] = engine.replay_endpoint
    return body | more


@pytest.fixture
def two(engine):
    """A service's two workers: `two(service)`. The first holds three blocks of PROMPT, the second one."""

    def join(service, **more):
        engines = [engine(), engine()]
        for number, each in enumerate(engines, 1):
            assert service.post("/workers", worker(each, number, **more)).body["lifecycle"] == "schedulable"
        engines[0].say(stored([11, 12, 13], PROMPT[:12]))
        engines[1].say(stored([21], PROMPT[:4]))
        eventually(lambda: blocks(service) == {1: 3, 2: 1})
        return engines

    return join


def blocks(service) -> dict[int, int]:
    """Blocks of PROMPT on the device, by worker."""
    answer = service.post("/overlap_scores", {"model_name": "m", "token_ids": PROMPT}).body
    return {line["worker_id"]: line["device_blocks"] for line in answer["workers"]}


def ask(**more):
    return {"model_name": "m", "token_ids": PROMPT} | more


def loads(service):
    """(prefill tokens, decode blocks, requests) by worker."""
    return {
        line["worker_id"]: (
            line["potential_prefill_tokens"],
            line["potential_decode_blocks"],
            line["active_requests"],
        )
        for group in service.get("/loads")
        for line in group["loads"]
    }


# --- workers


def test_a_worker_gets_requests_once_everything_is_said_of_it(start, engine):
    service = start(SELECT)
    record = service.post("/workers", {"worker_id": 1}).body
    assert (record["lifecycle"], record["model_name"], record["routing_group"]) == ("incomplete", "default", "default")
    assert [reason.split(":")[0] for reason in record["not_schedulable_reasons"]] == [
        "endpoint",
        "block_size",
        "kv_events_endpoint",
    ]
    ready = service.ask("GET", "/ready")
    assert (ready.status, ready.body["ready"], ready.body["schedulable_workers"]) == (503, False, 0)
    refusal = service.post("/select", {"token_ids": [1]})
    assert (refusal.status, refusal.body["kind"]) == (503, "not_ready")
    patch = {"endpoint": "http://w1", "block_size": BLOCK, "kv_events_endpoints": {"0": engine().endpoint}}
    changed = service.ask("PATCH", "/workers/1", patch)
    assert (changed.status, changed.body["lifecycle"]) == (200, "schedulable")
    assert "not_schedulable_reasons" not in changed.body
    assert service.ask("GET", "/ready").status == 200
    assert service.post("/select", {"token_ids": [1]}).body["endpoint"] == "http://w1"
    assert service.get("/workers?model_name=default")[0]["worker_id"] == 1
    assert service.get("/workers?routing_group=other") == []


def test_a_worker_of_another_block_size_is_kept_out_and_told_why(start, engine):
    service = start(SELECT)
    service.post("/workers", worker(engine(), 1))
    record = service.post("/workers", worker(engine(block_size=8), 2, block_size=8)).body
    assert record["lifecycle"] == "incomplete"
    assert record["not_schedulable_reasons"][0].startswith("block_size: 8 is not 4")
    assert "nothing is sent to worker 2: block_size: 8 is not 4" in service.log()
    assert service.get("/ready")["schedulable_workers"] == 1


def test_a_worker_that_leaves_takes_its_cache_and_its_reservations_along(start, two):
    service = start(SELECT)
    two(service)
    assert service.post("/select_and_reserve", ask(selection_id="a")).body["worker_id"] == 1
    gone = service.ask("DELETE", "/workers/1")
    assert (gone.status, gone.body["lifecycle"]) == (200, "unschedulable")
    assert service.ask("DELETE", "/workers/1").status == 404
    assert service.ask("DELETE", "/reservations/a").status == 404
    assert blocks(service) == {2: 1}
    assert service.post("/select", ask()).body["worker_id"] == 2
    service.ask("DELETE", "/workers/2")
    assert service.post("/select", ask()).status == 503
    assert service.get("/loads") == []


def test_limits_change_while_a_worker_stays(start, two):
    service = start(SELECT)
    two(service)
    service.post("/select_and_reserve", ask(selection_id="a"))
    assert service.ask("PATCH", "/workers/1", {"total_kv_blocks": 200}).body["total_kv_blocks"] == 200
    assert loads(service)[1] == (2, 4, 1)
    assert blocks(service) == {1: 3, 2: 1}
    refusal = service.ask("PATCH", "/workers/1", {"model_name": "other"})
    assert (refusal.status, refusal.body["field"]) == (400, "model_name")
    assert service.ask("PATCH", "/workers/9", {}).status == 404


def test_ranks_are_heard_at_ports_that_count_up(start, engine):
    service = start(SELECT)
    record = service.post("/workers", worker(engine(), 1, data_parallel_size=2, data_parallel_start_rank=4)).body
    assert record["lifecycle"] == "schedulable"
    assert {line["dp_rank"] for group in service.get("/loads") for line in group["loads"]} == {4, 5}


# --- choosing


def test_the_holder_is_chosen_and_nothing_is_booked(start, two):
    service = start(SELECT)
    two(service)
    chosen = service.post("/select", ask()).body
    assert chosen == {
        "model_name": "m",
        "routing_group": "default",
        "worker_id": 1,
        "dp_rank": 0,
        "endpoint": "http://w1:8000",
        "block_size": 4,
        "overlap": {"longest_matched": 12, "gpu": 12, "dp": {"0": 12}, "cpu": 12, "disk": 12},
        "effective_prefill_tokens": 2,
        "potential_decode_blocks": 4,
        "policy": "marginal",
        "reason": "lowest cost",
    }
    assert loads(service) == {1: (0, 0, 0), 2: (0, 0, 0)}
    hashes = compute_block_hash_for_seq(PROMPT, BLOCK)
    by_hash = {"model_name": "m", "block_hashes": hashes, "sequence_hashes": sequence_hashes(hashes), "isl_tokens": 14}
    assert service.post("/select", by_hash).body == chosen
    assert [line["potential_prefill_tokens"] for line in service.post("/potential_loads", ask()).body] == [2, 10]


def test_an_explanation_names_all_candidates(start, two):
    service = start(SELECT)
    two(service)
    routing = service.post("/select", ask(explain=True)).body["routing"]
    assert [candidate["worker_id"] for candidate in routing["candidates"]] == [1, 2]
    assert routing["candidates"][0]["overlap_blocks"]["device"] == 3


def test_a_reservation_counts_until_it_is_freed(start, two):
    service = start(SELECT, "--router-track-output-blocks")
    two(service)
    reserved = service.post("/select_and_reserve", ask(selection_id="a"))
    assert reserved.status == 200
    hashes = sequence_hashes(compute_block_hash_for_seq(PROMPT, BLOCK))
    assert [value % (1 << 64) for value in reserved.body["sequence_hashes"]] == hashes
    assert (reserved.body["selection_id"], reserved.body["isl_tokens"]) == ("a", 14)
    assert loads(service) == {1: (2, 4, 1), 2: (0, 0, 0)}
    assert service.post("/select_and_reserve", ask(selection_id="a")).status == 409
    assert service.post("/reservations/a/prefill_complete").status == 200
    assert loads(service)[1] == (0, 4, 1)
    assert service.post("/reservations/a/output_block").body == {"status": "ok", "counted": True}
    assert loads(service)[1] == (0, 5, 1)
    service.post("/reservations/a/output_block", {"decay_fraction": 0.0})
    assert loads(service)[1] == (0, 3, 1)
    assert service.ask("DELETE", "/reservations/a").status == 200
    assert loads(service)[1] == (0, 0, 0)
    assert service.ask("DELETE", "/reservations/a").status == 404
    without_id = service.post("/select_and_reserve", ask()).body
    assert service.ask("DELETE", f"/reservations/{without_id['selection_id']}", {"output_tokens": 7}).status == 200


def test_what_was_selected_may_be_reserved_once_and_in_time(start, two):
    service = start(SELECT, "--selection-cache-ttl-secs", "0.5")
    two(service)
    service.post("/select", ask(selection_id="a"))
    assert service.post("/reservations", {"selection_id": "a"}).status == 404  # of the model "default"
    reserved = service.post("/reservations", {"selection_id": "a", "model_name": "m"})
    assert (reserved.status, reserved.body["worker_id"], reserved.body["endpoint"]) == (201, 1, "http://w1:8000")
    assert loads(service)[1] == (2, 4, 1)
    assert service.post("/reservations", {"selection_id": "a", "model_name": "m"}).status == 409
    service.post("/select", ask(selection_id="b"))
    eventually(lambda: "dynamo_select_service_pending_selections 0" in service.get("/metrics"))
    assert service.post("/reservations", {"selection_id": "b", "model_name": "m"}).status == 404


def test_a_caller_may_choose_itself(start, two):
    service = start(SELECT)
    two(service)
    body = ask(selection_id="a", worker_id=2)
    assert service.post("/reservations", body).body["worker_id"] == 2
    assert loads(service)[2] == (10, 4, 1)
    service.post("/reservations", body | {"selection_id": "b", "track_prefill_tokens": False})
    service.post("/reservations", body | {"selection_id": "c", "effective_prefill_tokens": 5})
    assert loads(service)[2] == (15, 6, 3)
    assert service.post("/reservations", body | {"selection_id": "d", "worker_id": 9}).status == 404
    assert service.post("/reservations", body | {"selection_id": "d", "dp_rank": 9}).status == 404


def test_callers_may_narrow_the_choice(start, two):
    service = start(SELECT)
    two(service)
    service.ask("PATCH", "/workers/2", {"taints": ["spot"]})
    for narrower in (
        {"allowed_worker_ids": [2]},
        {"pinned_worker": {"worker_id": 2, "dp_rank": 0}},
        {"routing_constraints": {"required_taints": ["spot"]}},
        {"routing_constraints": {"preferred_taints": {"spot": 9.0}}},
    ):
        assert service.post("/select", ask(**narrower)).body["worker_id"] == 2
    for nobody in ({"allowed_worker_ids": [9]}, {"routing_constraints": {"required_taints": ["gpu9"]}}):
        assert service.post("/select", ask(**nobody)).status == 503


def test_a_session_stays_with_its_worker(start, two):
    service = start(SELECT, "--session-affinity-ttl-secs", "60")
    two(service)
    service.post("/select_and_reserve", ask(session_id="s", allowed_worker_ids=[2]))
    assert service.post("/select", ask(session_id="s")).body["worker_id"] == 2
    assert service.post("/select", ask(session_id="t")).body["worker_id"] == 1
    service.ask("DELETE", "/workers/2")
    assert service.post("/select", ask(session_id="s")).body["worker_id"] == 1


def test_without_events_it_goes_by_what_it_sent(start, engine):
    service = start(SELECT, "--no-router-kv-events")
    for number in (1, 2):
        body = {"worker_id": number, "model_name": "m", "endpoint": f"http://w{number}", "block_size": BLOCK}
        assert service.post("/workers", body).body["lifecycle"] == "schedulable"
    first = service.post("/select_and_reserve", ask(selection_id="a")).body["worker_id"]
    service.ask("DELETE", "/reservations/a")
    again = service.post("/select", ask()).body
    assert (again["worker_id"], again["overlap"]["gpu"]) == (first, 12)


# --- when all are busy


def test_when_all_are_busy_it_is_said_at_once(start, two):
    service = start(SELECT, "--active-prefill-tokens-threshold", "0")
    two(service)
    for number in (1, 2):
        service.post("/select_and_reserve", ask(selection_id=str(number), allowed_worker_ids=[number]))
    refusal = service.post("/select_and_reserve", ask())
    assert (refusal.status, refusal.body["kind"], refusal.headers["retry-after"]) == (529, "overloaded", "1")
    service.post("/reservations/1/prefill_complete")
    assert service.post("/select_and_reserve", ask()).status == 200


def test_a_request_waits_for_room_and_goes(start, two):
    service = start(SELECT, "--router-queue-threshold", "0")
    two(service)
    for number in (1, 2):
        service.post("/select_and_reserve", ask(selection_id=str(number), allowed_worker_ids=[number]))
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(service.post("/select_and_reserve", ask(selection_id="w")))
    )
    waiting.start()
    eventually(lambda: service.get("/loads")[0]["pending_count"] == 1)
    assert service.get("/loads")[0]["pending_isl_tokens"] == 14
    assert service.post("/select_and_reserve", ask(selection_id="w")).status == 409
    service.post("/reservations/2/prefill_complete")
    waiting.join(10)
    assert answers[0].status == 200
    assert service.get("/loads")[0]["pending_count"] == 0


def test_a_caller_that_goes_while_it_waits_leaves_nothing(start, two):
    import http.client
    import json

    service = start(SELECT, "--router-queue-threshold", "0")
    two(service)
    for number in (1, 2):
        service.post("/select_and_reserve", ask(selection_id=str(number), allowed_worker_ids=[number]))
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=5)
    connection.request("POST", "/select_and_reserve", json.dumps(ask(selection_id="w")))
    eventually(lambda: service.get("/loads")[0]["pending_count"] == 1)
    connection.close()
    eventually(lambda: service.get("/loads")[0]["pending_count"] == 0)
    for number in (1, 2):
        service.ask("DELETE", f"/reservations/{number}")
    assert loads(service) == {1: (0, 0, 0), 2: (0, 0, 0)}
    assert service.post("/select_and_reserve", ask(selection_id="w")).status == 200


def test_a_signal_ends_it_cleanly_and_tells_those_who_wait(start, two):
    service = start(SELECT, "--router-queue-threshold", "0")
    two(service)
    for number in (1, 2):
        service.post("/select_and_reserve", ask(selection_id=str(number), allowed_worker_ids=[number]))
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(service.post("/select_and_reserve", ask())))
    waiting.start()
    eventually(lambda: service.get("/loads")[0]["pending_count"] == 1)
    began = time.monotonic()
    assert service.end() == 0
    assert time.monotonic() - began < 5
    waiting.join(10)
    assert (answers[0].status, answers[0].body["kind"]) == (503, "not_ready")


def test_a_reservation_that_nobody_ends_expires(start, two):
    service = start(SELECT, env={"DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS": "0.3"})
    two(service)
    service.post("/select_and_reserve", ask(selection_id="a"))
    eventually(lambda: loads(service)[1] == (0, 0, 0))
    assert service.post("/reservations/a/prefill_complete").status == 404
    assert "1 reservations were not ended within 0.3 s" in service.log()


# --- others like it


def test_a_service_that_starts_late_takes_over_what_a_peer_knows(start, engine):
    early, silent = start(SELECT), engine(replay=False)
    early.post("/workers", worker(silent, 1))

    def told() -> bool:
        silent.say(stored([11, 12, 13], PROMPT[:12]))
        return blocks(early) == {1: 3}

    eventually(told)
    late = start(SELECT, "--indexer-peers", early.url)
    late.post("/workers", worker(silent, 1))
    assert late.ask("GET", "/ready").status == 503
    eventually(lambda: late.ask("GET", "/ready").status == 200)
    assert blocks(late) == {1: 3}
    indexer = start("dynamo.indexer", "--peers", early.url)
    indexer.post("/register", silent.registration(1))
    question = {"token_ids": PROMPT, "model_name": "m"}
    eventually(lambda: indexer.post("/query", question).body["scores"] == {"1": {"0": 12}})


def test_replicas_count_what_the_others_have_reserved(start, two, tmp_path):
    from tests.integration.deployment import free_port

    port = free_port()
    first = start(SELECT, "--replica-sync-port", str(port))
    second = start(SELECT, "--replica-sync-port", "0", "--replica-sync-peers", f"tcp://127.0.0.1:{port}")
    for service in (first, second):
        two(service)
    assert second.get("/replica_sync/peers") == [f"tcp://127.0.0.1:{port}"]

    def shared() -> bool:
        chosen = first.post("/select_and_reserve", ask()).body
        if loads(second)[1][2]:
            return True
        first.ask("DELETE", f"/reservations/{chosen['selection_id']}")
        return False

    eventually(shared)
    eventually(lambda: loads(second) == loads(first))
    assert loads(first)[1] == (2, 4, 1)
    refusal = start(SELECT).post("/replica_sync/register_peer", {"endpoint": "tcp://127.0.0.1:1"})
    assert (refusal.status, refusal.body["kind"]) == (409, "conflict")


# --- refusals


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A service with one worker of the model "m" that has nothing."""
    from tests.services.engines import Engine
    from tests.services.processes import running

    engine = Engine()
    with running(tmp_path_factory.mktemp("select"), SELECT) as service:
        service.post("/workers", worker(engine, 1))
        yield service
    engine.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("POST", "/workers", {}, 422, "worker_id"),
        ("POST", "/workers", {"worker_id": "1"}, 422, "worker_id"),
        ("POST", "/workers", {"worker_id": -1}, 400, "worker_id"),
        ("POST", "/workers", {"worker_id": 5, "data_parallel_size": 0}, 400, "data_parallel_size"),
        ("POST", "/workers", {"worker_id": 5, "kv_transfer_enforcement": "maybe"}, 422, "kv_transfer_enforcement"),
        ("POST", "/workers", {"worker_id": 5, "taints": "x"}, 422, "taints"),
        ("PATCH", "/workers/one", {}, 400, "worker_id"),
        ("POST", "/select", b"", 503, None),
        ("POST", "/select", b"{", 400, None),
        ("POST", "/select", {"model_name": "m"}, 400, "token_ids"),
        ("POST", "/select", {"model_name": "m", "token_ids": [1 << 32]}, 400, "token_ids"),
        ("POST", "/select", {"model_name": "m", "block_hashes": [1, 2], "isl_tokens": 7}, 400, "isl_tokens"),
        ("POST", "/select", {"model_name": "m", "block_hashes": [1], "sequence_hashes": [2]}, 400, "sequence_hashes"),
        ("POST", "/select", ask(router_config_override={"router_temprature": 1}), 400, "router_config_override"),
        ("POST", "/select", ask(pinned_worker={"worker": 1}), 400, "pinned_worker"),
        ("POST", "/select", ask(selection_id=""), 400, "selection_id"),
        ("POST", "/select", ask(expected_output_tokens=-1), 400, "expected_output_tokens"),
        ("POST", "/select", ask(block_mm_infos=[{"mm": 1}]), 400, "block_mm_infos"),
        ("POST", "/select", {"model_name": "n", "token_ids": [1]}, 503, None),
        ("POST", "/reservations", ask(), 422, "selection_id"),
        ("POST", "/reservations", ask(selection_id="a"), 404, None),
        ("POST", "/reservations/a/prefill_complete", None, 404, None),
        ("POST", "/reservations/a/output_block", {"decay_fraction": 2}, 400, "decay_fraction"),
        ("GET", "/select", None, 405, None),
        ("GET", "/nothing", None, 404, None),
    ],
)
def test_a_wrong_request_is_refused_and_the_field_named(idle, method, path, body, status, field):
    reply = idle.ask(method, path, body)
    assert reply.status == status, reply
    assert reply.body.get("field") == field
    assert reply.body["error"]


def test_health_and_metrics_are_there(idle):
    assert idle.ask("GET", "/health").status == 200
    metrics = idle.get("/metrics")
    for line in (
        "dynamo_select_service_schedulable_workers 1",
        "dynamo_select_service_reservations 0",
        'dynamo_select_service_requests_total{endpoint="/health",method="GET"}',
    ):
        assert line in metrics


def test_a_wrong_command_line_is_one_line():
    for flags, words in (
        (["--router-polcy", "linear"], "did you mean --router-policy?"),
        (["--selection-cache-ttl-secs", "0"], "ttl_secs must be above 0"),
        (["--replica-sync-peers", "tcp://h:1"], "needs --replica-sync-port"),
        (["--router-replica-sync"], "use --replica-sync-port"),
        (["--indexer-peers", "h:1"], "is not http://host:port"),
        (["--router-policy-config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
    ):
        status, text = refused(SELECT, *flags)
        assert (status, text.count("\n")) == (2, 1), text
        assert words in text
