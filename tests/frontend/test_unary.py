"""An answer in one body."""

import msgspec

from dynamo.frontend.bodies import ChatCompletion, Completion, Health, Live, ModelList, ModelObject, Readiness
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    Served,
    StartFrontend,
    StartWorker,
    Wire,
    ask,
    chat,
    fetch,
    model_ready,
)


async def test_a_chat_answer_has_the_described_form(served: Served) -> None:
    service, worker = served
    worker.auto = "an answer"
    answer = await ask(service.port, CHAT, chat())
    body = msgspec.json.decode(answer.body, type=ChatCompletion)
    assert body.choices[0].message.content == "an answer"
    assert body.choices[0].finish_reason == "stop"
    assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens
    assert body.id.startswith("chatcmpl-")
    assert int(answer.headers["content-length"]) == len(answer.body)


async def test_a_completion_answer_has_the_described_form(served: Served) -> None:
    service, worker = served
    worker.auto = "rest"
    body = {"model": "tiny", "prompt": "the", "echo": True}
    found = msgspec.json.decode((await ask(service.port, COMPLETIONS, body)).body, type=Completion)
    assert found.choices[0].text == "therest"
    assert found.choices[0].logprobs is None


async def test_prompts_of_every_form_give_running_indexes(served: Served) -> None:
    service, worker = served
    worker.auto = "x"
    for prompt, prompts in (("a", 1), (["a", "b"], 2), ([100, 101], 1), ([[100], [101, 102]], 2)):
        answer = await ask(service.port, COMPLETIONS, {"model": "tiny", "prompt": prompt, "n": 2})
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(2 * prompts))
        assert {choice["text"] for choice in choices} == {"x"}


async def test_token_prompts_reach_the_worker_as_they_are(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": [100, 101, 102], "max_tokens": 7, "seed": 3})
    taken = await worker.take()
    assert taken.request.token_ids == [100, 101, 102]
    assert taken.request.stop_conditions.max_tokens == 7
    assert taken.request.sampling_options.seed == 3
    taken.answer("x")
    await wire.read()
    wire.close()


async def test_logprobs_of_all_pieces_are_joined(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": "a", "logprobs": 0})
    taken = await worker.take()
    for token in (100, 101, 102):
        taken.send(token_ids=[token], log_probs=[-1.0])
    taken.finish()
    taken.stream.end()
    choice = (await wire.read()).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [-1.0, -1.0, -1.0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"][0] == 0
    wire.close()


async def test_a_worker_need_not_name_a_finish_reason(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat())
    taken = await worker.take()
    taken.say("enough")
    taken.stream.end()
    choice = (await wire.read()).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("enough", "stop")
    wire.close()


async def test_a_worker_may_answer_in_text_of_its_own(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat())
    taken = await worker.take()
    taken.send(text="made ")
    taken.send(text="elsewhere", finish_reason="stop")
    taken.stream.end()
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "made elsewhere"
    wire.close()


async def test_extra_fields_are_in_nvext(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    names = ["worker_id", "timing", "completion_token_ids", "stop_reason", "engine_data"]
    wire.post(CHAT, chat(nvext={"extra_fields": names}))
    taken = await worker.take()
    taken.send(token_ids=[100, 101])
    taken.send(token_ids=[102], finish_reason="length", engine_data={"a": 1})
    taken.stream.end()
    nvext = (await wire.read()).json()["nvext"]
    assert nvext["completion_token_ids"] == [100, 101, 102]
    assert nvext["worker_id"]["prefill_worker_id"] == worker.instance_id
    assert nvext["engine_data"] == {"a": 1}
    assert nvext["stop_reason"] is None
    assert nvext["timing"]["request_received_ms"] > 1.6e12
    wire.close()


async def test_the_request_id_goes_to_the_worker_and_back(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    trace = "0af7651916cd43dd8448eb211c80319c"
    wire.post(
        CHAT,
        chat(),
        f"x-request-id: my-id\r\ntraceparent: 00-{trace}-b7ad6b7169203331-01\r\nX-Dynamo-Meta-Team: blue\r\n",
    )
    taken = await worker.take()
    assert taken.context.id() == "my-id"
    assert taken.context.trace_id == trace
    assert taken.context.metadata["team"] == "blue"
    taken.answer("x")
    assert (await wire.read()).headers["x-request-id"] == "my-id"
    wire.close()


async def test_a_named_header_becomes_metadata(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend(limits={"metadata_header": "X-Account"})
    worker = await start_worker()
    await model_ready(service, "tiny")
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(), "x-account: 42\r\n")
    taken = await worker.take()
    assert taken.context.metadata == {"x-account": "42"}
    taken.answer("x")
    await wire.read()
    wire.close()


async def test_headers_say_where_and_how_urgently(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(
        CHAT,
        chat(nvext={"dp_rank": 1}),
        f"x-dynamo-worker-instance-id: {worker.instance_id}\r\nx-dynamo-dp-rank: 0\r\nx-tenant-id: t\r\n"
        "x-dynamo-request-priority: 5\r\nx-dynamo-session-id: s1\r\n",
    )
    taken = await worker.take()
    routing = taken.request.routing
    assert routing is not None
    assert (routing.backend_instance_id, routing.dp_rank, routing.cache_salt) == (worker.instance_id, 0, "t")
    assert (routing.priority, routing.priority_jump) == (5, 5.0)
    assert taken.request.agent_context == {"session_id": "s1"}
    taken.answer("x")
    await wire.read()
    wire.close()


async def test_a_request_template_fills_what_is_absent(
    start_frontend: StartFrontend, start_worker: StartWorker, tmp_path
) -> None:
    template = tmp_path / "template.json"
    template.write_text('{"model":"tiny","temperature":0.5,"max_completion_tokens":9}')
    service = await start_frontend(request_template=str(template))
    worker = await start_worker()
    await model_ready(service, "tiny")
    wire = await Wire.open(service.port)
    wire.post(CHAT, {"messages": [{"role": "user", "content": "x"}]})
    taken = await worker.take()
    assert taken.request.sampling_options.temperature == 0.5
    assert taken.request.stop_conditions.max_tokens == 9
    taken.answer("x")
    await wire.read()
    wire.close()


async def test_other_pages_have_the_described_form(served: Served) -> None:
    service, worker = served
    listed = msgspec.json.decode((await fetch(service.port, "/v1/models")).body, type=ModelList)
    assert [model.id for model in listed.data] == ["tiny"]
    assert listed.data[0].context_window > 0
    msgspec.json.decode((await fetch(service.port, "/v1/models/tiny")).body, type=ModelObject)
    ready = msgspec.json.decode((await fetch(service.port, "/v1/models/tiny/ready")).body, type=Readiness)
    assert ready.ready
    assert ready.namespaces["dynamo"].worker_types["aggregated"].workers == 1
    health = msgspec.json.decode((await fetch(service.port, "/health")).body, type=Health)
    assert health.endpoints == ["dyn://dynamo.backend.generate"]
    assert health.instances[0]["instance_id"] == worker.instance_id
    msgspec.json.decode((await fetch(service.port, "/live")).body, type=Live)


async def test_head_has_the_headers_of_get(served: Served) -> None:
    service, _ = served
    got, head = await fetch(service.port, "/v1/models"), await fetch(service.port, "/v1/models", "HEAD")
    assert head.status == 200
    assert head.headers["content-length"] == got.headers["content-length"]


async def test_the_docs_load_nothing_from_elsewhere(served: Served) -> None:
    service, _ = served
    page = (await fetch(service.port, "/docs")).body.decode()
    assert "ChatCompletionRequest" in page
    assert "http://" not in page
    assert "https://" not in page


async def test_paths_can_be_changed(start_frontend: StartFrontend, start_worker: StartWorker, monkeypatch) -> None:
    monkeypatch.setenv("DYN_HTTP_SVC_CHAT_PATH", "/talk")
    monkeypatch.setenv("DYN_HTTP_SVC_MODELS_PATH", "/who")
    service = await start_frontend()
    (await start_worker()).auto = "x"
    await model_ready(service, "tiny")
    assert (await ask(service.port, "/talk", chat())).status == 200
    assert (await ask(service.port, CHAT, chat())).status == 404
    assert (await fetch(service.port, "/who/tiny")).status == 200
    assert "/talk" in (await fetch(service.port, "/openapi.json")).json()["paths"]


async def test_what_a_request_cost_is_in_the_metrics(served: Served) -> None:
    service, worker = served
    worker.auto = "four words are said"
    await ask(service.port, CHAT, chat())
    await ask(service.port, CHAT, chat(stream=True))
    text = (await fetch(service.port, "/metrics")).body.decode()
    for line in (
        'requests_total{endpoint="chat_completions",error_type="",model="tiny",request_type="stream",status="success"}',
        'requests_started_total{endpoint="chat_completions",model="tiny",request_type="unary"} 1.0',
        'active_requests{model="tiny"} 0.0',
        'time_to_first_token_seconds_bucket{le="0.0022",model="tiny"}',
        'inter_token_latency_seconds_bucket{le="0.0018",model="tiny"}',
        'request_duration_seconds_count{model="tiny"} 2.0',
        'output_sequence_tokens_count{model="tiny"} 2.0',
        'input_sequence_tokens_bucket{le="100",model="tiny"} 2.0',
        'model_ready{model="tiny"} 1.0',
        "disconnected_clients 0.0",
        'stage_duration_seconds_bucket{le="0.0005",stage="preprocess"}',
        f'worker_last_input_sequence_tokens{{dp_rank="none",worker_id="{worker.instance_id}",worker_type="decode"}}',
    ):
        assert f"dynamo_frontend_{line}" in text, line
    assert "dynamo_frontend_event_loop_delay_seconds" in text
    known = text.split('tokenizer_cache_cached_tokens_total{model="tiny"} ')[1].split("\n")[0]
    new = text.split('tokenizer_cache_uncached_tokens_total{model="tiny"} ')[1].split("\n")[0]
    assert float(known) + float(new) > 0


async def test_what_text_costs_is_in_the_metrics(served: Served) -> None:
    service, worker = served
    worker.auto = "one two three"
    for _ in range(3):
        assert (await ask(service.port, CHAT, chat("Hello"))).status == 200
    text = (await fetch(service.port, "/metrics")).body.decode()
    for line in (
        "dynamo_frontend_template_seconds_count 3.0",
        "dynamo_frontend_tokenize_seconds_count 3.0",
        'dynamo_frontend_tokenizer_latency_ms_count{operation="tokenize"} 3.0',
        'dynamo_frontend_images_per_request_count{model="tiny"} 3.0',
    ):
        assert line in text
    value = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    made = value["dynamo_frontend_detokenize_token_count"]
    assert made == value['dynamo_frontend_output_tokens_total{model="tiny"}'] > 0
    assert value["dynamo_frontend_detokenize_total_us"] > 0
