"""Models come, go, and agree."""

import asyncio
import logging
from pathlib import Path

import pytest

from dynamo.cli.demo_model import make_demo_model
from dynamo.frontend.models import NamespaceFilter
from dynamo.frontend.service import FrontendService
from dynamo.llm import ModelRuntimeConfig, WorkerType
from dynamo.runtime import DistributedRuntime
from tests.frontend.front_door import (
    CHAT,
    StartFrontend,
    StartWorker,
    ask,
    changed,
    chat,
    fetch,
    model_gone,
    model_ready,
)


def names(answer_json: dict) -> list[str]:
    return [model["id"] for model in answer_json["data"]]


async def say(service: FrontendService, model: str) -> str:
    answer = await ask(service.port, CHAT, chat() | {"model": model})
    assert answer.status == 200, answer.body
    return str(answer.json()["choices"][0]["message"]["content"])


async def test_two_models_are_served_by_their_own_workers(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    one = await start_worker("org/one", endpoint="dynamo.one.generate")
    two = await start_worker("two", endpoint="dynamo.two.generate")
    one.auto, two.auto = "I am one", "I am two"
    await model_ready(service, "org/one")
    await model_ready(service, "two")
    assert await say(service, "org/one") == "I am one"
    assert await say(service, "two") == "I am two"
    assert names((await fetch(service.port, "/v1/models")).json()) == ["org/one", "two"]
    assert (await fetch(service.port, "/v1/models/org/one")).json()["id"] == "org/one"
    assert (await fetch(service.port, "/v1/models/org%2Fone/ready")).json()["ready"] is True
    assert (await fetch(service.port, "/v1/models/org")).status == 404
    await one.leave()
    await model_gone(service, "org/one")
    assert await say(service, "two") == "I am two"


async def test_a_model_that_comes_back_is_served_again(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    for word in ("first", "second"):
        worker = await start_worker()
        worker.auto = word
        await model_ready(service, "tiny")
        assert await say(service, "tiny") == word
        await worker.leave()
        await model_gone(service, "tiny")


async def test_aliases_are_models_too(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend()
    worker = await start_worker(model_aliases=["nick"])
    worker.auto = "same"
    await model_ready(service, "nick")
    answer = await ask(service.port, CHAT, chat() | {"model": "nick"})
    assert answer.json()["model"] == "nick"
    assert await say(service, "tiny") == "same"


async def test_a_worker_that_disagrees_is_refused_until_the_others_are_gone(
    start_frontend: StartFrontend, start_worker: StartWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = await start_frontend()
    old = await start_worker()
    old.auto = "old"
    await model_ready(service, "tiny")
    checksum = next(service.models.sets()).checksum
    other = make_demo_model(tmp_path / "other", weights=False)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    with caplog.at_level(logging.WARNING, "dynamo.frontend"):
        new = await start_worker(directory=other)
        await changed(service, lambda: next(service.models.sets()).refused)
    new.auto = "new"
    refusal = next(record.getMessage() for record in caplog.records if "refused" in record.getMessage())
    assert f"{new.instance_id:x}" in refusal
    assert checksum[:16] in refusal
    assert next(iter(next(service.models.sets()).refused.values())).checksum[:16] in refusal
    for _ in range(6):
        assert await say(service, "tiny") == "old"
    await old.leave()
    await changed(
        service, lambda: (m := service.models.get("tiny")) and m.ready and not next(service.models.sets()).refused
    )
    assert await say(service, "tiny") == "new"


async def test_sets_of_two_namespaces_share_the_load_by_their_size(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    blue = [await start_worker(endpoint="blue.backend.generate") for _ in range(2)]
    green = await start_worker(endpoint="green.backend.generate")
    for worker in (*blue, green):
        worker.auto = "x"
    await model_ready(service, "tiny", workers=3)
    await asyncio.gather(*(say(service, "tiny") for _ in range(120)))
    assert 15 < green.answered < 70  # 40 on average
    assert green.answered + sum(worker.answered for worker in blue) == 120


@pytest.mark.parametrize(
    ("given", "inside", "outside"),
    [
        ({"namespace": "blue"}, ["blue"], ["blue-2", "green"]),
        ({"prefix": "blue"}, ["blue", "blue-2"], ["blues", "green"]),
        ({"namespace": "green", "prefix": "blue"}, ["blue", "blue-2"], ["green"]),
        ({}, ["blue", "green"], []),
    ],
)
def test_the_namespaces_served(given: dict, inside: list[str], outside: list[str]) -> None:
    served = NamespaceFilter(given.get("namespace"), given.get("prefix"))
    assert [name for name in (*inside, *outside) if name in served] == inside


async def test_a_model_of_another_namespace_is_not_there(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(namespace="mine")
    await start_worker("theirs", endpoint="other.backend.generate")
    await start_worker("ours", endpoint="mine.backend.generate")
    await model_ready(service, "ours")
    assert names((await fetch(service.port, "/v1/models")).json()) == ["ours"]


async def test_a_model_is_ready_only_with_what_its_workers_need(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    decode = await start_worker(
        endpoint="dynamo.decode.generate", worker_type=WorkerType.Decode, needs=[[WorkerType.Prefill]]
    )
    decode.auto = "x"
    await changed(service, lambda: (m := service.models.get("tiny")) and any(s.ready for s in m.sets.values()))
    assert (await ask(service.port, CHAT, chat())).status == 503
    assert names((await fetch(service.port, "/v1/models")).json()) == []
    readiness = (await fetch(service.port, "/v1/models/tiny/ready")).json()
    assert readiness["ready"] is False
    assert readiness["namespaces"]["dynamo"]["missing_worker_types"] == ["prefill"]
    assert readiness["namespaces"]["dynamo"]["worker_types"]["decode"] == {"workers": 1, "needs": [["prefill"]]}
    prefill = await start_worker(endpoint="dynamo.prefill.generate", worker_type=WorkerType.Prefill)
    prefill.auto = "x"
    await changed(service, lambda: (m := service.models.get("tiny")) and m.ready)
    assert await say(service, "tiny") == "x"


async def test_a_model_waits_for_its_first_workers(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend(router_min_initial_workers=2)
    await start_worker()
    await changed(service, lambda: (m := service.models.get("tiny")) and any(s.worker_count for s in m.sets.values()))
    assert (await ask(service.port, CHAT, chat())).status == 503
    second = await start_worker()
    await model_ready(service, "tiny", workers=2)
    await second.leave()
    await model_ready(service, "tiny", workers=1)  # once it has had them, fewer are enough


async def test_files_that_cannot_be_had_are_asked_for_again(
    start_frontend: StartFrontend,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from dynamo.frontend import worker_set
    from dynamo.runtime.errors import Unknown

    fetch_files, failures = worker_set.fetch_files, [Unknown("no"), OSError("disk full"), ValueError("odd")]

    async def flaky(*args: object) -> Path:
        if failures:
            raise failures.pop(0)
        return await fetch_files(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(worker_set, "fetch_files", flaky)
    monkeypatch.setattr(worker_set, "FIRST_RETRY_S", 0.001)
    service = await start_frontend()
    (await start_worker()).auto = "x"
    with caplog.at_level(logging.WARNING, "dynamo.frontend"):
        await model_ready(service, "tiny")
    assert len([r for r in caplog.records if "not usable yet" in r.getMessage()]) == 1
    assert await say(service, "tiny") == "x"


async def test_a_card_that_cannot_be_read_is_ignored(
    runtime: DistributedRuntime,
    start_frontend: StartFrontend,
    start_worker: StartWorker,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = await start_frontend()
    with caplog.at_level(logging.WARNING, "dynamo.frontend"):
        await runtime.discovery.put("v1/mdc/dynamo/backend/generate/abc", b"{not a card")
        await runtime.discovery.put("v1/mdc/odd", b"{}")
        (await start_worker()).auto = "x"
        await model_ready(service, "tiny")
    assert sum("ignoring the model card" in r.getMessage() for r in caplog.records) == 2
    assert await say(service, "tiny") == "x"


async def test_the_facts_of_a_model_are_in_the_metrics(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    await start_worker(kv_cache_block_size=16, runtime_config=ModelRuntimeConfig(total_kv_blocks=1000, max_num_seqs=64))
    await model_ready(service, "tiny")
    text = (await fetch(service.port, "/metrics")).body.decode()
    for line in ("total_kv_blocks", "max_num_seqs", "kv_cache_block_size", "context_length", "migration_limit"):
        assert f'dynamo_frontend_model_{line}{{model="tiny"}}' in text
    assert 'dynamo_frontend_model_total_kv_blocks{model="tiny"} 1000.0' in text
