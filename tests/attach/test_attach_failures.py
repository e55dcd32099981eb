"""What happens when the attached server is down, broken, slow, someone else, or talks nonsense?"""

import asyncio
import contextlib
import json
import logging
import shutil
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dynamo.frontend.service import FrontendService
from tests.attach.asking import chat, events, post, until
from tests.attach.pretend_server import PretendServer
from tests.attach.vllm_servers import StartAttach

CHAT = "/v1/chat/completions"


async def served(frontend: FrontendService, workers: int = 1) -> None:
    """Until the frontend can answer for `tiny`."""

    def ready() -> bool:
        model = frontend.models.get("tiny")
        return model is not None and model.ready and sum(s.worker_count for s in model.sets.values()) == workers

    await until(ready)


async def gone(frontend: FrontendService) -> None:
    """Until nobody answers for `tiny`."""
    await until(lambda: (model := frontend.models.get("tiny")) is None or not model.ready)


@pytest.fixture(params=["tokens", "openai"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_server_that_goes_is_left_at_once_and_joined_again(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, mode: str
) -> None:
    await attach(server.url, mode=mode)
    await served(frontend)
    before = {i.instance_id for s in frontend.models.sets() for i in s.instances()}
    await server.stop()
    began = time.monotonic()
    await gone(frontend)
    assert time.monotonic() - began < 2  # checked every 0.1 s here, every 2 s in earnest
    status, body = await post(frontend.url, CHAT, chat(max_tokens=4))
    assert status in (404, 503), body
    await server.start()
    await served(frontend)
    assert (await post(frontend.url, CHAT, chat(max_tokens=4)))[0] == 200
    after = {i.instance_id for s in frontend.models.sets() for i in s.instances()}
    assert not before & after  # what was known of the old one's cache and load is not the new one's


async def test_a_request_that_finds_the_server_gone_makes_it_leave_before_any_check(
    server: PretendServer,
    frontend: FrontendService,
    attach: StartAttach,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await attach(server.url, mode=mode)
    monkeypatch.setattr("dynamo.attach.monitor.INTERVAL_S", 60.0)
    await served(frontend)
    await asyncio.sleep(0.15)  # the pause that was begun with the short interval
    await server.stop()
    status, body = await post(frontend.url, CHAT, chat(max_tokens=4))
    assert status == 503, body
    await gone(frontend)


async def test_requests_in_flight_end_with_an_error_when_the_server_dies(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, mode: str
) -> None:
    async def begin_only(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await server.events(request)
        choice = {"index": 0, "token_ids": [300], "delta": {"content": "x"}, "finish_reason": None}
        await server.send(response, {"choices": [choice]})
        await asyncio.sleep(60)
        return response

    server.answer = begin_only
    await attach(server.url, mode=mode)
    await served(frontend)
    asking = asyncio.create_task(post(frontend.url, CHAT, chat(stream=True, max_tokens=9)))
    await until(lambda: server.in_flight == 1)
    await asyncio.sleep(0.1)
    await server.stop()
    async with asyncio.timeout(10):
        status, body = await asking
    assert status == 200
    assert b"event: error" in body
    assert b"[DONE]" not in body


async def test_an_unhealthy_server_is_left(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(server.url)
    await served(frontend)
    server.health = 503
    await gone(frontend)
    server.health = 200
    await served(frontend)


@pytest.mark.parametrize("change", ["model", "root"])
async def test_another_model_on_the_same_port_is_refused_loudly(
    server: PretendServer,
    frontend: FrontendService,
    attach: StartAttach,
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    await attach(server.url)
    await served(frontend)
    was = getattr(server, change)
    setattr(server, change, "another")
    await gone(frontend)
    await until(lambda: "another model is at" in caplog.text)
    await asyncio.sleep(0.5)  # several checks
    assert frontend.models.get("another") is None
    setattr(server, change, was)
    await served(frontend)


async def test_a_restarted_server_is_a_new_worker(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(server.url)
    await served(frontend)
    (before,) = [i.instance_id for s in frontend.models.sets() for i in s.instances()]
    server.started += 60  # too quick for any check to meet a closed port

    def replaced() -> bool:
        ids = [i.instance_id for s in frontend.models.sets() for i in s.instances()]
        return len(ids) == 1 and ids != [before]

    await until(replaced)


async def test_several_servers_at_one_address_are_named_and_do_not_flap(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, caplog: pytest.LogCaptureFixture
) -> None:
    await attach(server.url)
    await served(frontend)
    ids = {i.instance_id for s in frontend.models.sets() for i in s.instances()}
    server.started -= 60  # the answer of an older process, as behind a load balancer
    await until(lambda: "several servers answer" in caplog.text)
    server.started += 60
    await asyncio.sleep(0.5)
    assert {i.instance_id for s in frontend.models.sets() for i in s.instances()} == ids


async def test_a_server_that_is_not_there_yet_is_waited_for(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, caplog: pytest.LogCaptureFixture
) -> None:
    await server.stop()
    await attach(server.url)
    await until(lambda: "cannot connect" in caplog.text)
    await server.start()
    await served(frontend)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ({"models_status": 404}, "is this an OpenAI server"),
        ({"api_key": "secret"}, "--api-key"),
        ({"others": [{"id": "big", "root": "/big"}]}, "--served-model"),
    ],
)
async def test_what_cannot_be_attached_ends_the_program_with_a_reason(
    server: PretendServer, attach: StartAttach, prepare: dict[str, Any], words: str
) -> None:
    for name, value in prepare.items():
        setattr(server, name, value)
    with pytest.raises(ValueError, match=words):
        await asyncio.wait_for(await attach(server.url), 10)


async def test_the_key_goes_to_the_server(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, mode: str
) -> None:
    server.api_key = "secret"
    await attach(server.url, mode=mode, api_key="secret")
    await served(frontend)
    assert (await post(frontend.url, CHAT, chat(max_tokens=2), Authorization="Bearer mine"))[0] == 200


ERROR_BODY = b'{"error": {"message": "too blue", "type": "BadRequestError", "param": "temperature", "code": 400}}'


def refusing(status: int) -> Any:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=status, body=ERROR_BODY, content_type="application/json", headers={"X-Why": "blue"})

    return answer


@pytest.mark.parametrize(("theirs", "ours"), [(400, 400), (422, 400), (404, 404), (500, 500), (429, 529), (503, 529)])
async def test_in_tokens_mode_a_refusal_keeps_its_meaning_and_words(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, theirs: int, ours: int
) -> None:
    server.answer = refusing(theirs)
    await attach(server.url)
    await served(frontend)
    status, body = await post(frontend.url, CHAT, chat())
    assert (status, json.loads(body)["error"]["message"]) == (ours, "too blue")


@pytest.mark.parametrize("theirs", [400, 404, 422, 429, 500, 503])
async def test_in_openai_mode_a_refusal_is_the_servers_own_to_the_byte(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, theirs: int
) -> None:
    server.answer = refusing(theirs)
    await attach(server.url, mode="openai")
    await served(frontend)
    assert await post(frontend.url, CHAT, chat()) == (theirs, ERROR_BODY)


async def test_bodies_pass_through_to_the_byte(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(server.url, mode="openai")
    await served(frontend)
    asked = b'{ "messages":[ ] ,"model":"tiny","unheard_of": 1.0e+2 }'
    assert await post(frontend.url, CHAT, asked, **{"X-Mine": "7"}) == (200, b'{ "odd" :  "bytes", "n": 1.50 }')
    path, headers, body = server.seen[-1]
    assert (path, body, headers["x-mine"]) == (CHAT, asked, "7")
    assert headers["x-request-id"]


async def test_a_name_of_our_own_is_replaced_on_the_way_and_nothing_else(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(server.url, mode="openai", model_name="mine")
    await until(lambda: (model := frontend.models.get("mine")) is not None and model.ready)
    asked = b'{"messages":[],"model":"mine","seed": 1.0e+2}'
    assert (await post(frontend.url, CHAT, asked))[0] == 200
    assert json.loads(server.seen[-1][2]) == {"messages": [], "model": "tiny", "seed": 100.0}
    assert b"1.0e+2" in server.seen[-1][2]


GARBAGE = [
    b"data: {not json}\n\n",
    b"<html>hello</html>\n\n",
    b'data: {"choices": [{"index": 0}]}\n\n',
    b'data: {"choices": "x"}\n\n',
    b"data: 5\n\n",
    b"\x00\xff\n\n",
]


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_in_the_stream_is_an_error_of_that_request_alone(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, garbage: bytes
) -> None:
    async def nonsense(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await server.events(request)
        await response.write(garbage)
        return response

    await attach(server.url)
    await served(frontend)
    server.answer = nonsense
    status, body = await post(frontend.url, CHAT, chat(max_tokens=4))
    assert status == 500, body
    assert b"the server sent" in body
    server.answer = None
    assert (await post(frontend.url, CHAT, chat(max_tokens=4)))[0] == 200


async def test_an_error_event_in_the_stream_is_told(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    async def failing(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await server.events(request)
        await server.send(response, {"error": {"message": "out of memory", "code": 500}})
        await response.write(b"data: [DONE]\n\n")
        return response

    server.answer = failing
    await attach(server.url)
    await served(frontend)
    status, body = await post(frontend.url, CHAT, chat())
    assert (status, "out of memory" in json.loads(body)["error"]["message"]) == (500, True)


async def test_a_stream_that_just_ends_is_incomplete(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    async def short(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await server.events(request)

    server.answer = short
    await attach(server.url)
    await served(frontend)
    status, body = await post(frontend.url, CHAT, chat())
    assert (status, "before the answer ended" in json.loads(body)["error"]["message"]) == (503, True)


async def test_a_server_that_says_nothing_for_too_long_is_a_timeout(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    monkeypatch.setenv("DYN_ATTACH_READ_TIMEOUT_SECS", "0.3")
    await attach(server.url, mode=mode)
    await served(frontend)
    server.answer = hang
    status, body = await post(frontend.url, CHAT, chat())
    assert (status, "DYN_ATTACH_READ_TIMEOUT_SECS" in json.loads(body)["error"]["message"]) == (504, True)
    server.answer = None
    assert (await post(frontend.url, CHAT, chat(max_tokens=2)))[0] == 200  # slow is not down


async def test_a_client_that_leaves_closes_the_connection_to_the_server(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, mode: str
) -> None:
    async def slow(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await server.events(request)
        for _ in range(1000):
            await server.send(response, {"choices": [{"index": 0, "token_ids": [300], "finish_reason": None}]})
            await asyncio.sleep(0.02)
        return response

    server.answer = slow
    await attach(server.url, mode=mode)
    await served(frontend)
    asking = asyncio.create_task(post(frontend.url, CHAT, chat(stream=True)))
    await until(lambda: server.in_flight == 1)
    await asyncio.sleep(0.1)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(5):
        await server.idle.wait()


async def test_the_programs_end_waits_for_what_is_in_flight(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def slow(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await go_on.wait()
        return await server.repeat(request, [300], 3)

    server.answer = slow
    monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "10")
    task = await attach(server.url, mode=mode)
    await served(frontend)
    asking = asyncio.create_task(post(frontend.url, CHAT, chat(stream=True, max_tokens=3)))
    await until(lambda: server.in_flight == 1)
    shut_down(task)
    await gone(frontend)
    go_on.set()
    status, body = await asking
    assert status == 200
    assert len([e for e in events(body) if e["choices"]]) >= 3
    assert await asyncio.wait_for(task, 10) == 0


def shut_down(task: "asyncio.Task[int]") -> None:
    """What a signal does to the program of this task."""
    coroutine = task.get_coro()
    assert coroutine is not None
    coroutine.cr_frame.f_locals["runtime"].shutdown()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=server"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(words, check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("options", [{"tls_ca": True}, {"tls_verify": False}, {}])
async def test_a_servers_certificate_is_checked_unless_told_otherwise(
    server: PretendServer,
    frontend: FrontendService,
    attach: StartAttach,
    certificate: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
) -> None:
    await server.stop()
    server.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.tls.load_cert_chain(*certificate)
    await server.start()
    if "tls_ca" in options:
        options = {"tls_ca": str(certificate[0])}
    await attach(server.url, **options)
    if options:
        await served(frontend)
    else:
        await until(lambda: "certificate" in caplog.text)


async def test_prefix_caching_that_is_off_and_missing_events_are_said_loudly(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await attach(server.url)
    await served(frontend)
    assert "KV routing will be approximate" in caplog.text


@pytest.mark.parametrize(
    ("caching", "options", "words"),
    [
        (False, {"kv_events": "tcp://127.0.0.1:1"}, "prefix caching is off"),
        (True, {"kv_events": "tcp://127.0.0.1:1", "mode": "openai"}, "without tokens a router cannot tell"),
        (True, {"kv_events": "tcp://127.0.0.1:1"}, "no KV event was heard"),
    ],
)
async def test_kv_events_that_cannot_work_are_named(
    server: PretendServer,
    frontend: FrontendService,
    attach: StartAttach,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    caching: bool,
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr("dynamo.attach.kv_feed.QUIET_S", 0.05)
    monkeypatch.setattr("dynamo.attach.kv_feed.HEARD_WITHIN_S", 0.2)
    server.caching = caching
    await attach(server.url, **options)
    await served(frontend)
    await until(lambda: words in caplog.text)
