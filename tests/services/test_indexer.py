"""The indexer as a process, in front of engines that tell of their caches over ZeroMQ."""

import json
import random

import msgspec
import pytest

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.kv_events import RouterEvent
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import Overlap, WorkerKey
from tests.services.engines import BLOCK, stored
from tests.services.processes import eventually, refused

PROMPT = list(range(12))


@pytest.fixture(scope="module")
def indexer(tmp_path_factory):
    """One indexer for tests that only ask, or that use a model of their own."""
    from tests.services.processes import running

    with running(tmp_path_factory.mktemp("indexer"), "dynamo.indexer") as service:
        yield service


def prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts that share beginnings, more than fit into a cache together."""
    draw = random.Random(seed)
    systems = [[1000 * i + j for j in range(24)] for i in range(3)]
    return [draw.choice(systems) + draw.choices(range(100, 900), k=draw.randrange(1, 60)) for _ in range(count)]


def held(service, prompt, worker="1", model="m") -> int:
    """Tokens of a prompt that the index says a worker holds."""
    answer = service.post("/query", {"token_ids": prompt, "model_name": model}).body
    return answer["instances"].get(worker, {}).get("gpu", 0)


def batches(service, worker=1, model="m") -> int:
    """How many batches of a worker came."""
    lines = [line for line in service.get("/workers") if (line["instance_id"], line["model_name"]) == (worker, model)]
    return sum(each["batches"] for line in lines for each in line["listeners"].values())


def connected(service, engine, worker=1, model="m") -> None:
    """Return once the engine's words come through, and all that it said is heard."""

    def came() -> bool:
        engine.say()
        return batches(service, worker, model) > 0

    eventually(came)
    count = batches(service, worker, model)
    eventually(lambda: came() and batches(service, worker, model) > count)


# --- what is held


def test_under_load_and_eviction_the_index_is_the_cache(start, engine):
    service, engines = start("dynamo.indexer"), [engine(), engine()]
    for number, each in enumerate(engines, 1):
        assert service.post("/register", each.registration(number)).status == 201
        connected(service, each, number)
    asked = [prompts(number, 60) for number in (1, 2)]
    for each, mine in zip(engines, asked, strict=True):
        for prompt in mine:
            each.run(prompt)
    for number, each in enumerate(engines, 1):
        for prompt in asked[0][-10:] + asked[1][-10:]:
            eventually(lambda p=prompt, n=number, e=each: held(service, p, str(n)) == e.holds(p))
        assert any(each.holds(prompt) for prompt in asked[number - 1])
        assert 0 < len(each.pool.named()) <= 64


def test_ranks_and_tiers_are_counted_in_tokens(indexer, engine):
    first, second = engine(), engine()
    for rank, each in enumerate((first, second)):
        body = each.registration(7, model_name="tiers", dp_rank=rank)
        assert indexer.post("/register", body).status == 201
    first.say(stored([11, 12, 13], PROMPT))
    second.say(stored([21, 22], PROMPT[:8]))
    second.say(stored([23], PROMPT[8:], 22, medium="CPU"))
    expected = {
        "scores": {"7": {"0": 12, "1": 8}},
        "frequencies": [],
        "instances": {"7": {"longest_matched": 12, "gpu": 12, "dp": {"0": 12, "1": 8}, "cpu": 12, "disk": 12}},
    }
    question = {"token_ids": [*PROMPT, 5], "model_name": "tiers"}
    eventually(lambda: indexer.post("/query", question).body == expected)
    hashes = compute_block_hash_for_seq(PROMPT, BLOCK)
    signed = [value - (1 << 64) if value >> 63 else value for value in hashes]
    for block_hashes in (hashes, signed):
        assert indexer.post("/query_by_hash", {"block_hashes": block_hashes, "model_name": "tiers"}).body == expected
    second.say(stored([31], PROMPT[:4], medium="CPU"), stored([32], PROMPT[4:8], 31, medium="STORAGE"))
    first.say({"type": "AllBlocksCleared"})
    other = {"token_ids": PROMPT, "model_name": "tiers", "lora_name": "adapter"}
    assert indexer.post("/query", other).body["instances"] == {}
    assert indexer.post("/query", other | {"lora_name": None, "cache_salt": "tenant"}).body["instances"] == {}


def test_a_dump_makes_an_empty_index_the_same(start, engine):
    service, each = start("dynamo.indexer"), engine()
    service.post("/register", each.registration(1))
    connected(service, each)
    for prompt in prompts(3, 30):
        each.run(prompt)
    probe = prompts(3, 30)[-1]
    eventually(lambda: held(service, probe) == each.holds(probe) > 0)
    dump = service.get("/dump")
    assert set(dump) == {"m:default"}
    assert dump["m:default"]["block_size"] == BLOCK
    index = TierIndex()
    for event in msgspec.convert(dump["m:default"]["events"], list[RouterEvent]):
        index.apply(WorkerKey(event.worker_id, event.event.dp_rank), event.storage_tier, event.event.change)
    for prompt in prompts(3, 30):
        found = index.find(sequence_hashes(compute_block_hash_for_seq(prompt, BLOCK)))
        assert found.get(WorkerKey(1), Overlap()).device * BLOCK == each.holds(prompt)


# --- workers come and go


def test_a_worker_that_leaves_takes_its_blocks_along(indexer, engine):
    stays, leaves = engine(), engine()
    for number, each in ((1, stays), (2, leaves)):
        indexer.post("/register", each.registration(number, model_name="leaving"))
        each.say(stored([11, 12, 13], PROMPT))
        eventually(lambda n=str(number): held(indexer, PROMPT, n, "leaving") == 12)
    assert indexer.post("/unregister", {"instance_id": 2, "model_name": "leaving"}).status == 200
    assert set(indexer.post("/query", {"token_ids": PROMPT, "model_name": "leaving"}).body["instances"]) == {"1"}
    assert indexer.post("/unregister", {"instance_id": 2, "model_name": "leaving"}).status == 404
    indexer.post("/unregister", {"instance_id": 1, "model_name": "leaving"})
    gone = indexer.post("/query", {"token_ids": PROMPT, "model_name": "leaving"})
    assert gone.status == 404
    assert "leaving" in gone.body["error"]
    assert "leaving:default" not in indexer.get("/dump")


def test_groups_know_nothing_of_each_other(indexer, engine):
    each = engine()
    for group in ("a", "b"):
        indexer.post("/register", engine().registration(1, model_name="groups", routing_group=group))
    indexer.post("/register", each.registration(2, model_name="groups", tenant_id="a"))
    each.say(stored([11, 12, 13], PROMPT))
    question = {"token_ids": PROMPT, "model_name": "groups"}
    eventually(lambda: indexer.post("/query", question | {"routing_group": "a"}).body["scores"] == {"2": {"0": 12}})
    assert indexer.post("/query", question | {"routing_group": "b"}).body["scores"] == {}
    assert indexer.post("/query", question).status == 404


def test_an_indexer_that_starts_late_hears_everything_from_the_engine(start, engine):
    each = engine()
    for prompt in prompts(5, 40):
        each.run(prompt)
    service = start("dynamo.indexer")
    service.post("/register", each.registration(1))
    for prompt in prompts(5, 40):
        eventually(lambda p=prompt: held(service, p) == each.holds(p))


def test_an_indexer_that_starts_late_takes_over_what_a_peer_knows(start, engine):
    early, each = start("dynamo.indexer"), engine(replay=False)
    early.post("/register", each.registration(1))
    connected(early, each)
    for prompt in prompts(5, 40):
        each.run(prompt)
    probe = prompts(5, 40)[-1]
    eventually(lambda: held(early, probe) == each.holds(probe) > 0)
    workers = f"1={each.endpoint}"
    late = start(
        "dynamo.indexer",
        "--peers",
        f"http://127.0.0.1:1,{early.url}",
        "--workers",
        workers,
        "--block-size",
        "4",
        "--model-name",
        "m",
    )
    assert late.ask("GET", "/health").status == 503
    eventually(lambda: late.ask("GET", "/health").status == 200)
    for prompt in prompts(5, 40):
        assert held(late, prompt) == each.holds(prompt)
    assert "127.0.0.1:1 did not tell" in late.log()
    for prompt in prompts(6, 20):  # and goes on from there
        each.run(prompt)
        eventually(lambda p=prompt: held(late, p) == each.holds(p))
    (line,) = late.get("/workers")
    assert line["listeners"]["0"]["reason"] == ""


def test_lost_batches_are_asked_for_again(indexer, engine):
    each = engine()
    indexer.post("/register", each.registration(1, model_name="lossy"))
    connected(indexer, each, model="lossy")
    each.say(stored([11, 12], PROMPT[:8]), lost=True)
    each.say(stored([13], PROMPT[8:], 12))
    eventually(lambda: held(indexer, PROMPT, model="lossy") == 12)


def test_what_is_lost_for_good_is_not_guessed(indexer, engine):
    each = engine(replay=False)
    indexer.post("/register", each.registration(1, model_name="lost"))
    connected(indexer, each, model="lost")
    each.say(stored([11, 12], PROMPT[:8]))
    eventually(lambda: held(indexer, PROMPT, model="lost") == 8)
    each.say({"type": "BlockRemoved", "block_hashes": [11, 12]}, lost=True)
    each.say(stored([51], [5, 5, 5, 5]))
    eventually(lambda: held(indexer, [5, 5, 5, 5], model="lost") == 4)
    assert held(indexer, PROMPT, model="lost") == 0


def test_what_a_worker_stored_before_is_said_to_be_unknown(indexer, engine):
    for name, said_before in (("old", True), ("new", False)):
        each = engine(replay=False)
        if said_before:
            each.say(stored([11, 12], PROMPT[:8]))
        indexer.post("/register", each.registration(1, model_name=name))
        if said_before:
            connected(indexer, each, model=name)
        (line,) = [line for line in indexer.get("/workers") if line["model_name"] == name]
        assert "only what came since" in line["listeners"]["0"]["reason"]


# --- refusals


def test_a_worker_of_another_block_size_is_refused(indexer, engine):
    assert indexer.post("/register", engine().registration(1, model_name="sizes")).status == 201
    refusal = indexer.post("/register", engine(block_size=8).registration(2, model_name="sizes"))
    assert refusal.status == 409
    assert refusal.body["error"].startswith("block_size: 8 is not 4")
    again = indexer.post("/register", engine().registration(1, model_name="sizes"))
    assert again.status == 409
    assert "registered already" in again.body["error"]


def test_an_engine_whose_blocks_are_not_what_was_said_is_shown_as_failed(indexer, engine):
    liar = engine(block_size=8)
    indexer.post("/register", liar.registration(1, model_name="liar", block_size=4))
    connected_to = lambda: [line for line in indexer.get("/workers") if line["model_name"] == "liar"]  # noqa: E731

    def failed() -> bool:
        liar.run(list(range(16)) if not liar.sequence else [liar.sequence] * 16)
        return connected_to()[0]["status"] == "failed"

    eventually(failed)
    assert "8-token blocks, expected 4" in connected_to()[0]["listeners"]["0"]["reason"]
    assert held(indexer, list(range(16)), model="liar") == 0
    assert 'dynamo_kvindexer_listeners{status="failed"} 1' in indexer.get("/metrics")
    indexer.post("/unregister", {"instance_id": 1, "model_name": "liar"})


REGISTRATION = {"instance_id": 1, "endpoint": "tcp://127.0.0.1:5557", "model_name": "x", "block_size": 4}


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/register", b"{nonsense", 400, None),
        ("/register", [1], 422, None),
        *(("/register", {k: v for k, v in REGISTRATION.items() if k != name}, 422, name) for name in REGISTRATION),
        ("/register", REGISTRATION | {"instance_id": -1}, 400, "instance_id"),
        ("/register", REGISTRATION | {"instance_id": "1"}, 422, "instance_id"),
        ("/register", REGISTRATION | {"block_size": 0}, 400, "block_size"),
        ("/register", REGISTRATION | {"dp_rank": -1}, 400, "dp_rank"),
        ("/register", REGISTRATION | {"endpoint": "http://h:1"}, 400, "endpoint"),
        ("/register", REGISTRATION | {"endpoint": "tcp://h:99999"}, 400, "endpoint"),
        ("/register", REGISTRATION | {"replay_endpoint": "h"}, 400, "replay_endpoint"),
        ("/register", REGISTRATION | {"model_name": ""}, 400, "model_name"),
        ("/unregister", {"model_name": "x"}, 422, "instance_id"),
        ("/query", {"model_name": "here"}, 422, "token_ids"),
        ("/query", {"model_name": "here", "token_ids": [1, "2"]}, 422, "token_ids[1]"),
        ("/query", {"model_name": "here", "token_ids": [-1]}, 400, "token_ids"),
        ("/query", {"model_name": "nowhere", "token_ids": [1]}, 404, None),
        ("/query_by_hash", {"model_name": "here", "block_hashes": [1 << 64]}, 422, "block_hashes"),
        ("/register_peer", {"url": "ftp://h"}, 400, "url"),
        ("/register_peer", {}, 422, "url"),
        ("/deregister_peer", {"url": "http://h:1"}, 404, None),
        ("/nowhere", {}, 404, None),
    ],
)
def test_a_wrong_request_is_refused_and_the_field_named(indexer, engine, path, body, status, field):
    if body and "here" in str(body):
        indexer.post("/register", engine().registration(1, model_name="here"))
    reply = indexer.ask("POST", path, body)
    assert reply.status == status, reply
    assert reply.body.get("field") == field
    assert reply.body["error"]
    if field is not None:
        assert reply.body["error"].startswith(f"{field}: ")


def test_a_wrong_method_names_the_right_ones(indexer):
    reply = indexer.ask("GET", "/query")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")


def test_a_body_without_bounds_is_refused(indexer):
    assert indexer.ask("POST", "/query", b" " * (33 << 20)).status == 413


def test_an_unknown_field_is_told_in_the_log(indexer, engine):
    indexer.post("/register", engine().registration(1, model_name="typo"))
    indexer.post("/query", {"model_name": "typo", "token_ids": [], "lora_nam": "x"})
    eventually(lambda: "'lora_nam' of a request is not known here; did you mean lora_name?" in indexer.log())


# --- operating it


def test_peers_can_be_told_of(indexer):
    assert indexer.get("/peers") == []
    for _ in range(2):
        assert indexer.post("/register_peer", {"url": "http://h:1/"}).status == 201
    assert indexer.get("/peers") == ["http://h:1"]
    assert indexer.post("/deregister_peer", {"url": "http://h:1"}).status == 200
    assert indexer.get("/peers") == []


def test_it_is_healthy_once_the_workers_are_there(start, engine):
    service = start("dynamo.indexer", env={"DYN_ROUTER_MIN_INITIAL_WORKERS": "1"})
    reply = service.ask("GET", "/health")
    assert (reply.status, reply.body["status"]) == (503, "waiting for workers")
    service.post("/register", engine().registration(1))
    assert service.ask("GET", "/health").status == 200


def test_requests_are_counted_and_logged(start, tmp_path):
    log = tmp_path / "access.log"
    service = start("dynamo.indexer", "--access-log", str(log), "--trace-id-header", "x-trace")
    service.ask("POST", "/query", {"model_name": "m", "token_ids": []}, {"x-trace": "abc"})
    log.rename(tmp_path / "old.log")
    assert service.post("/reopen_logs").status == 200
    service.get("/health")
    line = json.loads((tmp_path / "old.log").read_text())
    assert {k: v for k, v in line.items() if k not in ("ts", "duration_ms")} == {
        "trace_id": "abc",
        "method": "POST",
        "path": "/query",
        "model": "m",
        "status": 404,
    }
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == ["/reopen_logs", "/health"]
    metrics = service.get("/metrics")
    assert 'dynamo_kvindexer_requests_total{endpoint="/query",method="POST"} 1' in metrics
    assert 'dynamo_kvindexer_errors_total{endpoint="/query",status_class="4xx"} 1' in metrics
    assert "dynamo_kvindexer_models 0" in metrics


def test_a_signal_ends_it_cleanly(start, engine):
    service = start("dynamo.indexer")
    service.post("/register", engine().registration(1))
    assert service.end() == 0


def test_a_wrong_command_line_is_one_line(start):
    assert refused("dynamo.indexer", "--prot", "1") == (
        2,
        "python -m dynamo.indexer: error: unknown argument '--prot'; did you mean --port?\n",
    )
    status, text = refused("dynamo.indexer", "--workers", "1=tcp://h:1")
    assert (status, "needs --block-size" in text) == (2, True)
    status, text = refused("dynamo.indexer", "--workers", "one=tcp://h:1", "--block-size", "4")
    assert (status, "id:rank=endpoint" in text) == (2, True)
    port = start("dynamo.indexer").url.rsplit(":", 1)[1]
    status, text = refused("dynamo.indexer", "--port", port)
    assert (status, f"cannot listen on 127.0.0.1:{port}" in text.splitlines()[-1]) == (1, True)
