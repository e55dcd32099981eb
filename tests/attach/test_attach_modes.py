"""Is the server told apart rightly, and the mode chosen that its answers can be trusted in?"""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo.attach.args import AttachOptions, parse_args, server_url
from dynamo.attach.load import read_metrics
from dynamo.attach.plan import CannotSendTokens, make_plan
from dynamo.attach.probe import probe
from dynamo.attach.server import OpenAIServer
from dynamo.attach.sse import all_events, events
from dynamo.engine.worker_args import WorkerOptions
from dynamo.frontend.service import FrontendService
from dynamo.llm.kv_events import LoadMetrics
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import Unknown
from dynamo.runtime.events import create_subscriber
from tests.attach.asking import chat, post, text_of, until
from tests.attach.pretend_server import PretendServer
from tests.attach.vllm_servers import StartAttach


async def found(server: PretendServer, **options: Any) -> tuple[str, str]:
    """What is said of the server, and of the plan."""
    http = OpenAIServer(server.url)
    try:
        facts = await probe(http, options.get("served_model"))
        return str(facts), str(await make_plan(http, facts, AttachOptions(url=server.url, **options)))
    finally:
        await http.close()


async def test_one_line_says_what_was_found(server: PretendServer, model_dir: Path) -> None:
    facts, plan = await found(server)
    assert facts == (
        f"vLLM 0.32.0 serving tiny ({model_dir}), max_model_len 512, 400 KV blocks of 16 tokens, prefix caching on"
    )
    assert plan == (
        "tokens in and out by /inference/v1/generate; mode tokens: "
        f"frontends tokenize with {model_dir} (verified), so routers see prompts"
    )


async def test_without_the_token_endpoint_completions_take_tokens(server: PretendServer) -> None:
    server.scale_out = False
    _, plan = await found(server)
    assert plan.startswith("tokens in and out by /v1/completions; mode tokens")


async def test_a_server_that_gives_no_ids_back_is_passed_through(server: PretendServer) -> None:
    server.scale_out = server.returns_ids = False
    _, plan = await found(server)
    assert "mode openai" in plan
    assert "403 Scale-out endpoints are disabled" in plan
    assert "token_ids" in plan


async def test_another_tokenizer_is_never_used(server: PretendServer) -> None:
    server.tokenizer_shift = 1
    _, plan = await found(server)
    assert "mode openai: another tokenizer" in plan
    with pytest.raises(CannotSendTokens, match="--mode tokens: another tokenizer"):
        await found(server, mode="tokens")


async def test_another_chat_template_is_never_used(server: PretendServer, model_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    _, plan = await found(server, worker=WorkerOptions(custom_jinja_template=str(template)))
    assert "mode openai: another chat template" in plan


async def test_without_a_tokenizer_at_hand_it_is_passed_through(
    server: PretendServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.root = "someone/not-here"
    _, plan = await found(server)
    assert "mode openai: no tokenizer at hand" in plan
    assert "--model-path" in plan


async def test_a_directory_given_by_hand_wins(server: PretendServer, model_dir: Path) -> None:
    server.root = "someone/not-here"
    _, plan = await found(server, model_path=str(model_dir))
    assert "mode tokens" in plan


@pytest.mark.parametrize("scale_out", [True, False])
async def test_tokens_go_in_and_out(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, scale_out: bool
) -> None:
    server.scale_out = scale_out
    await attach(server.url)
    await until(lambda: (model := frontend.models.get("tiny")) is not None and model.ready)
    status, body = await post(
        frontend.url, "/v1/completions", {"model": "tiny", "prompt": "echo this", "max_tokens": 3}
    )
    assert status == 200, body
    answer = json.loads(body)
    assert answer["choices"][0]["text"] == "echo this"[: len(answer["choices"][0]["text"])] != ""
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_what_a_request_asks_for_reaches_the_server(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(server.url)
    await until(lambda: (model := frontend.models.get("tiny")) is not None and model.ready)
    fields = {"seed": 7, "top_p": 0.5, "min_tokens": 2, "frequency_penalty": 0.25, "logit_bias": {"300": 1.5}, "n": 2}
    body = chat(max_tokens=4, cache_salt="tenant", response_format={"type": "json_object"}, **fields)
    assert (await post(frontend.url, "/v1/chat/completions", body))[0] == 200
    asked = [json.loads(body) for path, _, body in server.seen if path == "/inference/v1/generate"][-2:]
    sampling = [each["sampling_params"] for each in asked]
    assert sorted(s["seed"] for s in sampling) == [7, 8]
    for each in sampling:
        expected = {"temperature": 0.0, "top_p": 0.5, "min_tokens": 2, "frequency_penalty": 0.25, "max_tokens": 4}
        assert expected.items() <= each.items()
        assert each["detokenize"] is False
        assert each["logit_bias"] == {"300": 1.5}
        assert each["structured_outputs"]["json"] == {"type": "object"}
    assert {each["cache_salt"] for each in asked} == {"tenant"}
    assert all(each["model"] == "tiny" for each in asked)


async def test_what_no_server_streams_is_refused_by_name(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(server.url)
    await until(lambda: (model := frontend.models.get("tiny")) is not None and model.ready)
    body = {"model": "tiny", "prompt": "a b", "max_tokens": 2, "echo": True, "logprobs": 1}
    status, answer = await post(frontend.url, "/v1/completions", body)
    assert (status, b"prompt_logprobs" in answer) == (400, True)


async def test_adapters_are_offered_where_requests_pass_through(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    server.others = [{"id": "tiny-sql", "root": "/sql", "parent": "tiny"}]
    await attach(server.url, mode="openai")
    await until(lambda: (model := frontend.models.get("tiny-sql")) is not None and model.ready)


async def test_load_is_read_and_published(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, runtime: DistributedRuntime
) -> None:
    endpoint = runtime.endpoint("dynamo.backend.generate")
    subscriber = await create_subscriber(runtime, endpoint, "kv_metrics")
    await attach(server.url)
    async with asyncio.timeout(10):
        async for event in subscriber:
            load = msgspec.msgpack.decode(event.payload, type=LoadMetrics)
            if load.running_requests:
                break
    assert (load.running_requests, load.waiting_requests, load.kv_used_blocks) == (3, 2, 100)
    await subscriber.close()


def test_metrics_of_sglang_are_read() -> None:
    text = (
        'sglang:num_running_reqs{model_name="m",tp_rank="0",dp_rank="1"} 4.0\n'
        'sglang:num_queue_reqs{model_name="m",tp_rank="0",dp_rank="1"} 1.0\n'
        'sglang:token_usage{model_name="m",dp_rank="1"} 0.5\nnonsense{ 1\nsglang:token_usage NaN\n'
    )
    ranks = read_metrics(text).ranks
    assert (ranks[1].running, ranks[1].waiting, ranks[1].usage) == (4, 1, 0.5)
    assert ranks[0].usage == 0


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_events_are_found_however_the_stream_is_cut(size: int) -> None:
    body = b'data: {"a":1}\n\n: remark\n\nevent: x\r\ndata: 1\r\ndata: 2\r\n\r\ndata:[DONE]\n\ndata: tail'
    expected = [b'{"a":1}', b"1\n2", b"[DONE]", b"tail"]

    async def pieces() -> Any:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    assert [event async for event in events(pieces())] == expected
    assert all_events(body) == expected


async def test_an_event_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.attach.sse.MAX_EVENT_BYTES", 1000)

    async def pieces() -> Any:
        while True:
            yield b"data: " + b"x" * 400

    with pytest.raises(Unknown, match="more than 1000 bytes"):
        async for _ in events(pieces()):
            pass


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:8000", "http://h:8000"),
        ("h:8000/", "http://h:8000"),
        ("https://h/base/v1/", "https://h/base"),
        ("http://[::1]:80/v1", "http://[::1]:80"),
    ],
)
def test_an_address_is_read_with_or_without_v1(text: str, url: str) -> None:
    assert server_url(text) == url


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "URL: is required"),
        (["ftp://h"], "is not the address"),
        (["http://h:x"], "URL"),
        (["http://h", "--mode", "bytes"], "--mode"),
        (["http://h", "--kv-events", "5557"], "--kv-events: '5557' is not tcp://host:port"),
        (["http://h", "--kv-replay", "tcp://h:1"], "--kv-replay: needs --kv-events"),
        (["http://h", "--tls-ca", "x.pem"], "https://"),
        (["https://h", "--tls-ca", "/no/such.pem"], "--tls-ca"),
        (["http://h", "--kv-event", "tcp://h:1"], "did you mean --kv-events?"),
    ],
)
def test_a_wrong_command_line_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_the_key_is_not_shown() -> None:
    options = parse_args(["http://h", "--api-key", "secret"])
    assert "secret" not in str(options.shown())


async def test_text_comes_back_as_it_was_said(
    server: PretendServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(server.url)
    await until(lambda: (model := frontend.models.get("tiny")) is not None and model.ready)
    _, streamed = await post(frontend.url, "/v1/chat/completions", chat(max_tokens=5, stream=True))
    _, whole = await post(frontend.url, "/v1/chat/completions", chat(max_tokens=5))
    assert text_of(streamed) == text_of(whole) != ""
