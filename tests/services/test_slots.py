"""The slot tracker as a process."""

import pytest

from tests.integration.deployment import free_port
from tests.services.processes import eventually, refused, running

SLOTS = "dynamo.slot_tracker"
WORKER = {"worker_id": 1, "model_name": "m", "block_size": 4, "dp_start": 0, "dp_size": 2}
ADD = {
    "model_name": "m",
    "request_id": "r",
    "worker_id": 1,
    "dp_rank": 0,
    "sequence_hashes": [1, -2, 3],
    "new_isl_tokens": 12,
}


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    with running(tmp_path_factory.mktemp("slots"), SLOTS) as service:
        yield service


@pytest.fixture
def slots(tracker):
    """The tracker with one worker of two ranks and nothing else."""
    for line in tracker.get("/workers"):
        tracker.post("/unregister", line)
    assert tracker.post("/register", WORKER).status == 201
    return tracker


def loads(service):
    """(prefill tokens, decode blocks) by rank of worker 1."""
    return {
        line["dp_rank"]: (line["active_prefill_tokens"], line["active_decode_blocks"])
        for line in service.get("/loads?model_name=m")
    }


def test_a_request_counts_from_add_to_free(slots):
    assert loads(slots) == {0: (0, 0), 1: (0, 0)}
    assert slots.post("/add", ADD).status == 201
    assert slots.post("/add", ADD | {"request_id": "same prompt"}).status == 201
    assert loads(slots) == {0: (24, 3), 1: (0, 0)}
    potential = slots.post("/potential_loads", {"model_name": "m", "sequence_hashes": [1, -2, 5], "new_isl_tokens": 7})
    assert potential.body == [
        {
            "worker_id": 1,
            "dp_rank": 0,
            "potential_prefill_tokens": 31,
            "potential_decode_blocks": 4,
            "active_requests": 2,
        },
        {
            "worker_id": 1,
            "dp_rank": 1,
            "potential_prefill_tokens": 7,
            "potential_decode_blocks": 3,
            "active_requests": 0,
        },
    ]
    assert slots.post("/prefill_complete", {"model_name": "m", "request_id": "r"}).status == 200
    assert loads(slots)[0] == (12, 3)
    for request_id in ("r", "same prompt", "r"):
        assert slots.post("/free", {"model_name": "m", "request_id": request_id}).status == 200
    assert loads(slots) == {0: (0, 0), 1: (0, 0)}


def test_a_worker_that_leaves_takes_its_requests_along(slots):
    slots.post("/add", ADD)
    assert slots.get("/workers") == [{"routing_group": "default", **WORKER}]
    assert slots.post("/unregister", {"worker_id": 1, "model_name": "m"}).status == 200
    assert slots.get("/loads") == []
    assert slots.post("/prefill_complete", {"model_name": "m", "request_id": "r"}).status == 404
    slots.post("/register", WORKER)
    assert loads(slots) == {0: (0, 0), 1: (0, 0)}


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/register", WORKER, 409, None),
        ("/register", WORKER | {"worker_id": 2, "block_size": 8}, 409, None),
        ("/register", WORKER | {"worker_id": 2, "block_size": 0}, 400, "block_size"),
        ("/register", WORKER | {"worker_id": 2, "dp_size": 0}, 400, "dp_size"),
        ("/register", {"worker_id": 2}, 422, "model_name"),
        ("/unregister", {"worker_id": 9, "model_name": "m"}, 404, None),
        ("/add", ADD | {"worker_id": 9}, 404, None),
        ("/add", ADD | {"dp_rank": 2}, 404, None),
        ("/add", ADD | {"model_name": "n"}, 404, None),
        ("/add", ADD | {"new_isl_tokens": -1}, 400, "new_isl_tokens"),
        ("/add", ADD | {"sequence_hashes": [1 << 64]}, 422, "sequence_hashes"),
        ("/add", {name: value for name, value in ADD.items() if name != "dp_rank"}, 422, "dp_rank"),
        ("/prefill_complete", {"model_name": "m", "request_id": "never"}, 404, None),
        ("/free", {"model_name": "n", "request_id": "r"}, 404, None),
        ("/replica_sync/register_peer", {"endpoint": "tcp://h:1"}, 409, None),
    ],
)
def test_a_wrong_request_is_refused_and_the_field_named(slots, path, body, status, field):
    reply = slots.post(path, body)
    assert reply.status == status, reply
    assert reply.body.get("field") == field
    assert reply.body["error"]


def test_an_active_request_is_not_added_twice(slots):
    slots.post("/add", ADD)
    assert slots.post("/add", ADD | {"dp_rank": 1}).status == 409
    assert loads(slots) == {0: (12, 3), 1: (0, 0)}


def test_replicas_agree_and_forget_what_a_dead_one_had(start):
    ports = [free_port(), free_port()]
    one, other = (
        start(SLOTS, "--replica-sync-port", str(mine), "--replica-sync-peers", f"tcp://127.0.0.1:{theirs}")
        for mine, theirs in (ports, ports[::-1])
    )
    for service in (one, other):
        service.post("/register", WORKER)
    one.post("/add", ADD)  # perhaps before they are connected: then the next digest tells
    eventually(lambda: loads(other)[0] == (12, 3))
    other.post("/add", ADD | {"request_id": "q", "dp_rank": 1})
    eventually(lambda: loads(one)[1] == (12, 3))
    one.post("/prefill_complete", {"model_name": "m", "request_id": "r"})
    eventually(lambda: loads(other)[0] == (0, 3))
    one.popen.kill()
    eventually(lambda: loads(other) == {0: (0, 0), 1: (12, 3)})
    assert "has fallen silent" in other.log()


def test_a_signal_ends_it_cleanly(start):
    service = start(SLOTS, "--replica-sync-port", "0")
    service.post("/register", WORKER)
    assert service.ask("GET", "/health").status == 200
    assert "dynamo_slot_tracker_workers 1" in service.get("/metrics")
    assert service.end() == 0


def test_a_wrong_command_line_is_one_line():
    status, text = refused(SLOTS, "--replica-port", "1")
    assert (status, text.count("\n"), "did you mean --replica-sync-port?" in text) == (2, 1, True)
    status, text = refused(SLOTS, "--replica-sync-peers", "h:1", "--replica-sync-port", "1")
    assert (status, "is not tcp://host:port" in text) == (2, True)
