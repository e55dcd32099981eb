"""Does the checker of a run see what is wrong with an answer, and does the report say what was not held?"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from chaos.load import Answer, Client, Outcome, open_session
from chaos.questions import Question, Questioner
from chaos.report import Report, Window

from tests.integration.deployment import Deployment

TEXT = "one two three"
QUESTION = Question(1, {"stream": True}, 5, 3, TEXT)

Serve = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


def said(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


USAGE = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


@pytest.fixture
async def answer_of() -> AsyncIterator[Callable[..., Awaitable[Answer]]]:
    """What the client makes of a server that sends these bytes, and then ends in order or breaks off."""
    runners: list[web.AppRunner] = []

    async def ask(*parts: bytes, breaks: bool = False, status: int = 200) -> Answer:
        async def serve(request: web.Request) -> web.StreamResponse:
            if status != 200:
                return web.json_response({"error": {"message": "no"}}, status=status)
            response = web.StreamResponse()
            await response.prepare(request)
            for part in parts:
                await response.write(part)
            if breaks:
                assert request.transport is not None
                request.transport.abort()
            return response

        app = web.Application()
        app.router.add_post("/v1/chat/completions", serve)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with open_session() as session:
            return await Client({"f": f"http://127.0.0.1:{runner.addresses[0][1]}"}).ask(session, QUESTION)

    yield ask
    for runner in runners:
        await runner.cleanup()


WHOLE = (said("one two"), said(" three", "length"), USAGE, DONE)


@pytest.mark.parametrize(
    ("parts", "breaks", "status", "outcome"),
    [
        (WHOLE, False, 200, "right"),
        ((said("one two two"), *WHOLE[1:]), False, 200, "wrong"),  # a token repeated
        ((said("one"), *WHOLE[1:]), False, 200, "wrong"),  # a token missing
        ((said("one two", "length"), USAGE, DONE), False, 200, "wrong"),  # the end missing
        (
            (*WHOLE[:2], event(choices=[], usage={"prompt_tokens": 8, "completion_tokens": 3}), DONE),
            False,
            200,
            "wrong",
        ),
        (WHOLE[:2], False, 200, "lost"),
        (WHOLE[:1], True, 200, "cut"),
        ((WHOLE[0], event(error={"message": "gone"}, code=503)), False, 200, "refused"),
        ((WHOLE[0], event(error={"message": "bad"}, code=500)), False, 200, "wrong"),
        ((), False, 404, "wrong"),
    ],
)
async def test_every_ending_is_called_by_its_name(
    answer_of: Callable[..., Awaitable[Answer]], parts: tuple[bytes, ...], breaks: bool, status: int, outcome: Outcome
) -> None:
    answer = await answer_of(*parts, breaks=breaks, status=status)
    assert answer.outcome == outcome, answer


async def test_a_client_tries_another_frontend_only_before_an_answer_began(
    answer_of: Callable[..., Awaitable[Answer]],
) -> None:
    answer = await answer_of(WHOLE[0], breaks=True)
    assert answer.tries == 1


async def test_the_expected_answer_is_the_mockers(deployment: Deployment, model_dir: Path) -> None:
    deployment.mocker(model_dir, "--speedup-ratio", "100")
    deployment.frontend()
    await asyncio.to_thread(deployment.wait_for)
    questioner = Questioner(model_dir, "m", 7)
    async with open_session() as session:
        client = Client({"f": deployment.base})
        answers = [await client.ask(session, await questioner.make()) for _ in range(20)]
    assert [answer.detail for answer in answers if answer.outcome != "right"] == []
    assert {answer.stream for answer in answers} == {True, False}


def answer(outcome: Outcome, frontend: str = "f0", asked: float = 10.0, ended: float = 11.0) -> Answer:
    return Answer(1, True, asked, outcome, frontend=frontend, ended=ended)


def report(answers: list[Answer], windows: list[Window] | None = None, left_behind: list[str] | None = None) -> Report:
    return Report(1, "file", 60, windows or [], answers, 0.0, left_behind or [])


def test_nothing_is_broken_where_all_is_right() -> None:
    assert report([answer("right")]).broken() == []


@pytest.mark.parametrize("outcome", ["wrong", "lost", "hung"])
def test_one_answer_that_must_not_be_breaks_a_run(outcome: Outcome) -> None:
    assert report([answer("right")] * 9999 + [answer(outcome)]).broken() == [f"1 answers {outcome}"]


def test_too_many_clear_errors_break_a_run() -> None:
    assert report([answer("right")] * 1999 + [answer("refused")]).broken() == []
    assert report([answer("right")] * 99 + [answer("refused")]).broken() == ["99.00 % right, less than 99.9 %"]


def test_a_stream_may_be_cut_with_its_own_frontend_alone() -> None:
    killed = Window("frontend killed", "f0", 9.0, 10.5, 12.0)
    answers = [answer("right")] * 99
    assert report([*answers, answer("cut", "f0")], [killed]).broken() == []
    assert report([*answers, answer("cut", "f1")], [killed]).broken() != []
    assert report([*answers, answer("cut", "f0", 12.5, 13.0)], [killed]).broken() != []


def test_a_rolling_restart_allows_no_failure_at_all() -> None:
    restart = Window("rolling restart of all workers", "all", 9.0, 10.5, 12.0, rolling=True)
    answers = [*[answer("right")] * 9999, answer("refused")]
    assert report(answers, [restart]).broken() == ["rolling restart of all workers: {'refused': 1}"]


def test_what_is_left_behind_breaks_a_run() -> None:
    assert report([answer("right")], left_behind=["1 keys stayed in discovery"]).broken() != []
