"""Which prompts go to a prefill worker first, and who answers when a pool is overloaded."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from dynamo.frontend.args import parse
from dynamo.frontend.service import FrontendService
from dynamo.frontend.worker_set import WorkerSet
from dynamo.llm.model_card import ModelRuntimeConfig, WorkerType
from dynamo.router.prompt_hashes import PromptHashes
from dynamo.runtime.errors import WorkerOverloaded
from tests.frontend.front_door import (
    COMPLETIONS,
    Answer,
    ScriptedWorker,
    StartFrontend,
    StartWorker,
    Taken,
    Wire,
    ask,
    changed,
    fetch,
    model_ready,
)
from tests.frontend.kv_fleet import BLOCK, eventually, kv, total

PREFILL = "dynamo.prefill.generate"
ROUTE = "/conditional_disagg"
SHORT, LONG = list(range(100, 140)), list(range(100, 500))  # to either side of 64 tokens
SPLITS = "dynamo_frontend_prompt_splits_total"
BUSY = 100  # prompt tokens with which a worker is busy: more than SHORT, less than LONG

StartPair = Callable[..., Awaitable["Pair"]]


class Pair(NamedTuple):
    """A frontend in KV mode, with one worker of each kind."""

    service: FrontendService
    prefill: ScriptedWorker
    decode: ScriptedWorker

    @property
    def workers(self) -> WorkerSet:
        """The decode worker's set."""
        return next(s for s in self.service.models.sets() if s.serves)

    async def post(self, tokens: list[int], **fields: Any) -> Wire:
        """Ask for nine tokens more, and to be told why."""
        wire = await Wire.open(self.service.port)
        nvext = {"extra_fields": ["worker_id", "routing"], **fields.pop("nvext", {})}
        wire.post(COMPLETIONS, {"model": "tiny", "prompt": tokens, "max_tokens": 9, "nvext": nvext, **fields})
        return wire

    async def prefilled(self) -> Taken:
        """Let the prefill worker compute a prompt; gives back what came to the decode worker then."""
        self.first_token(await self.prefill.take())
        decoding = await self.decode.take()
        assert decoding.request.prefill_result is not None
        return decoding

    def first_token(self, taken: Taken) -> None:
        handle = {"id": "h", "incarnation": "i", "endpoint": "dynamo.prefill.handoff", "instance_id": 1}
        taken.send(token_ids=[200], finish_reason="length", disaggregated_params=handle)
        taken.stream.end()

    async def counted(self, *labels: str) -> float:
        return await total(self.service, SPLITS, *labels)


@pytest.fixture
async def start_pair(start_frontend: StartFrontend, start_worker: StartWorker) -> StartPair:
    async def start(**settings: Any) -> Pair:
        split = {"conditional_disagg_enabled": True, "conditional_disagg_eff_isl_threshold": 64}
        service = await start_frontend(**kv(**{"use_kv_events": False, **split, **settings}))
        facts = ModelRuntimeConfig(total_kv_blocks=1000, max_num_batched_tokens=100)
        options: dict[str, Any] = {"kv_cache_block_size": BLOCK, "runtime_config": facts}
        decode = await start_worker(worker_type=WorkerType.Decode, **options)
        prefill = await start_worker(endpoint=PREFILL, worker_type=WorkerType.Prefill, **options)
        await model_ready(service, "tiny", workers=2)
        await changed(service, lambda: any(s.split is not None for s in service.models.sets()))
        return Pair(service, prefill, decode)

    return start


def routing(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()["nvext"]["routing"]
    return found


# --- by the policy


async def test_a_short_prompt_is_computed_where_it_is_answered(start_pair: StartPair) -> None:
    pair = await start_pair()
    wire = await pair.post(SHORT)
    taken = await pair.decode.take()
    assert taken.request.prefill_result is None
    assert taken.request.sampling_options.seed is None  # one worker draws, so none is needed
    taken.answer("here")
    found = routing(await wire.read())
    assert found["split"] == {
        "policy": "isl_bounding",
        "remote": False,
        "cause": "short",
        "reason": "40 tokens to compute are at most 64",
        "terms": {"effective_tokens": 40, "effective_ratio": 1.0},
    }
    assert "prefill" not in found
    assert pair.prefill.requests.empty()
    assert await pair.counted('model="tiny"', 'pool="decode"', 'policy="isl_bounding"', 'cause="short"') == 1


async def test_a_long_prompt_travels(start_pair: StartPair) -> None:
    pair = await start_pair()
    wire = await pair.post(LONG)
    (await pair.prefilled()).answer("there")
    found = routing(await wire.read())
    assert (found["split"]["remote"], found["split"]["cause"]) == (True, "long")
    assert found["prefill"]["worker"]["worker_id"] == pair.prefill.instance_id
    assert await pair.counted('pool="prefill"', 'cause="long"') == 1


async def test_the_next_turn_is_computed_where_the_last_was_answered(start_pair: StartPair) -> None:
    pair = await start_pair()
    wire = await pair.post(LONG)
    (await pair.prefilled()).answer("there")  # and its KV is now there, too
    await wire.read()
    wire = await pair.post([*LONG, *range(500, 600)])
    (await pair.decode.take()).answer("here")
    split = routing(await wire.read())["split"]
    assert (split["remote"], split["cause"]) == (False, "cached")
    assert split["terms"]["effective_tokens"] == 100


async def test_a_prompt_is_hashed_once_wherever_it_goes(start_pair: StartPair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = await start_pair(conditional_disagg_policy="predicted")
    hashed: list[int] = []
    of = PromptHashes.of

    def counting(self: PromptHashes, token_ids: Any, *rest: Any) -> list[int]:
        hashed.append(len(token_ids))
        return of(self, token_ids, *rest)

    await one_after_another(pair, LONG)  # the first of 64 is hashed otherwise, to see how long that takes
    monkeypatch.setattr(PromptHashes, "of", counting)
    await one_after_another(pair, [7, *LONG])
    assert hashed == [401]


async def one_after_another(pair: Pair, tokens: list[int]) -> None:
    """A prompt whose prefill worker is named, so that both pools are asked."""
    wire = await pair.post(tokens, nvext={"prefill_worker_id": pair.prefill.instance_id})
    (await pair.prefilled()).answer("x")
    split = routing(await wire.read())["split"]
    assert (split["remote"], split["cause"]) == (True, "asked")


async def test_how_long_kv_travels_is_learnt_from_decode_workers(start_pair: StartPair) -> None:
    pair = await start_pair()
    before = pair.workers.transfer.seconds(1000)
    wire = await pair.post(LONG)
    decoding = await pair.prefilled()
    decoding.send(token_ids=[201], engine_data={"kv_transfer": {"tokens": 400, "bytes": 4000, "seconds": 0.1}})
    await eventually(lambda: pair.workers.transfer.seen == 1)
    assert pair.workers.router is not None
    assert pair.workers.router.scheduler.load.prefill_requests == [0]  # it decodes, and would be held up
    decoding.answer("there")
    await wire.read()
    assert pair.workers.transfer.seconds(1000) > before
    (status,) = [s for s in (await fetch(pair.service.port, "/status")).json()["models"]["tiny"] if s["split"]]
    assert status["split"]["policy"] == "isl_bounding"
    assert status["split"]["transfer"]["seen"] == 1


async def test_without_a_prefill_worker_the_split_is_said_not_to_be_in_effect(start_pair: StartPair) -> None:
    pair = await start_pair()
    await pair.prefill.leave()
    await changed(pair.service, lambda: pair.workers.split is None)
    wire = await pair.post(LONG)
    (await pair.decode.take()).answer("here")
    assert "split" not in routing(await wire.read())
    (status,) = (await fetch(pair.service.port, "/status")).json()["models"]["tiny"]
    assert status["split"] == {"in_effect": False, "why": "there is no prefill worker"}


async def test_where_it_would_go_names_both_workers(start_pair: StartPair) -> None:
    pair = await start_pair()
    for tokens, prefill in ((LONG, pair.prefill), (SHORT, pair.decode)):
        wire = await pair.post(tokens, nvext={"annotations": ["query_instance_id"]})
        nvext = (await wire.read()).json()["nvext"]
        assert nvext["worker_id"]["prefill_worker_id"] == prefill.instance_id
        assert nvext["worker_id"]["decode_worker_id"] == pair.decode.instance_id
        assert nvext["routing"]["split"]["remote"] == (tokens is LONG)
    assert pair.prefill.requests.empty()
    assert await pair.counted() == 0


# --- set while it runs


async def test_thresholds_are_changed_while_it_runs(start_pair: StartPair) -> None:
    pair = await start_pair()
    now = {
        "model": "tiny",
        "enabled": True,
        "policy": "isl_bounding",
        "eff_isl_threshold": 64,
        "eff_isl_ratio_threshold": 0.7,
        "prefill_busy_threshold": None,
        "decode_busy_threshold": None,
    }
    assert (await fetch(pair.service.port, ROUTE)).json() == {"settings": [now]}
    assert (await ask(pair.service.port, ROUTE, {"model": "tiny"})).json() == now
    change = {"model": "tiny", "eff_isl_threshold": 1000, "decode_busy_threshold": 0.5}
    assert (await ask(pair.service.port, ROUTE, change)).json() == now | change
    wire = await pair.post(LONG)
    (await pair.decode.take()).answer("here")
    assert routing(await wire.read())["split"]["cause"] == "short"
    change = {"model": "tiny", "decode_busy_threshold": None, "enabled": False}
    assert (await ask(pair.service.port, ROUTE, change)).json()["decode_busy_threshold"] is None
    wire = await pair.post(SHORT)
    (await pair.prefilled()).answer("there")
    assert routing(await wire.read())["split"]["cause"] == "always"


async def test_changes_outlive_the_workers_they_were_made_for(start_pair: StartPair, start_worker: StartWorker) -> None:
    pair = await start_pair()
    await ask(pair.service.port, ROUTE, {"model": "tiny", "policy": "predicted"})
    await pair.prefill.leave()
    await changed(pair.service, lambda: pair.workers.split is None)
    facts = ModelRuntimeConfig(total_kv_blocks=1000, max_num_batched_tokens=100)
    await start_worker(
        endpoint=PREFILL, worker_type=WorkerType.Prefill, kv_cache_block_size=BLOCK, runtime_config=facts
    )
    await changed(pair.service, lambda: pair.workers.split is not None)
    assert pair.workers.split is not None
    assert pair.workers.split.policy == "predicted"


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "none", "enabled": True}, 404, "model", "Model not found"),
        ({"eff_isl_threshold": -1}, 400, "eff_isl_threshold", "at least 0"),
        ({"eff_isl_ratio_threshold": 2}, 400, "eff_isl_ratio_threshold", "between 0 and 1"),
        ({"policy": "best"}, 400, "policy", "isl_bounding"),
        ({"policy": "prefill_load"}, 400, "prefill_busy_threshold", "nothing else to go by"),
        ({"eff_isl_threshold": "many"}, 400, "eff_isl_threshold", "Expected `int`"),
        ({"eff_isl_threshold": None}, 400, "eff_isl_threshold", "got `null`"),
        ({"threshold": 1}, 400, None, "unknown field `threshold`"),
    ],
)
async def test_settings_that_cannot_be_are_refused_by_name(
    start_pair: StartPair, change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    pair = await start_pair()
    answer = await ask(pair.service.port, ROUTE, {"model": "tiny"} | change)
    assert (answer.status, answer.json()["error"]["param"]) == (status, param)
    assert words in answer.json()["message"]
    assert (await ask(pair.service.port, ROUTE, {"model": "tiny"})).json()["policy"] == "isl_bounding"


async def test_splitting_needs_kv_mode_at_start_and_later(
    start_frontend: StartFrontend, start_worker: StartWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--router-conditional-disagg", "--router-mode", "random"])
    assert "--router-conditional-disagg: needs --router-mode kv" in capsys.readouterr().err
    service = await start_frontend()
    await start_worker()
    await model_ready(service, "tiny")
    refused = await ask(service.port, ROUTE, {"model": "tiny", "enabled": True})
    assert (refused.status, refused.json()["error"]["param"]) == (400, "enabled")
    assert "--router-mode kv" in refused.json()["message"]
    closed = await start_frontend(limits={"admin_api": False}, **kv())
    assert (await ask(closed.port, ROUTE, {"model": "tiny"})).status == 404
    assert ROUTE not in (await fetch(closed.port, "/openapi.json")).json()["paths"]


# --- where a pool is overloaded


async def test_an_overloaded_prefill_pool_leaves_prompts_to_decode(start_pair: StartPair) -> None:
    pair = await start_pair(active_prefill_tokens_threshold=BUSY)
    first = await pair.post(LONG)
    computing = await pair.prefill.take()
    wire = await pair.post([1, *LONG])
    (await pair.decode.take()).answer("here")
    split = routing(await wire.read())["split"]
    assert (split["remote"], split["cause"]) == (False, "prefill_overloaded")
    assert await pair.counted('pool="decode"', 'cause="prefill_overloaded"') == 1
    pair.first_token(computing)
    (await pair.decode.take()).answer("there")
    assert (await first.read()).status == 200


async def test_a_full_queue_of_the_prefill_pool_leaves_prompts_to_decode(start_pair: StartPair, tmp_path: Any) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(
        f"policy_classes: [{{name: one, prefill_busy_threshold: {BUSY}, request_queue_limit_per_worker: 1}}]"
    )
    pair = await start_pair(router_policy_config=str(file))
    posted = [await pair.post([number, *LONG]) for number in (1, 2)]  # one at the worker, one waits
    await eventually(lambda: pair.workers.split is not None and pair.workers.split.prefill.queue.pending == 1)
    wire = await pair.post([3, *LONG])
    (await pair.decode.take()).answer("here")
    split = routing(await wire.read())["split"]
    assert (split["remote"], split["cause"]) == (False, "prefill_overloaded")
    assert "one" in split["reason"]
    for each in posted:
        (await pair.prefilled()).answer("there")
        assert (await each.read()).status == 200


async def test_a_prefill_worker_that_is_full_leaves_its_prompt_to_decode(start_pair: StartPair) -> None:
    pair = await start_pair()
    wire = await pair.post(LONG)
    (await pair.prefill.take()).stream.fail(WorkerOverloaded("no room"))
    decoding = await pair.decode.take()
    assert decoding.request.prefill_result is None
    decoding.answer("here")
    assert (await wire.read()).status == 200
    assert await total(pair.service, "dynamo_frontend_remote_prefills_total", 'outcome="shed"') == 1
    assert await total(pair.service, "dynamo_frontend_remote_prefills_total", 'outcome="lost"') == 0


async def test_an_overloaded_decode_pool_has_prompts_computed_elsewhere(start_pair: StartPair) -> None:
    pair = await start_pair(active_prefill_tokens_threshold=BUSY, conditional_disagg_eff_isl_threshold=1000)
    first = await pair.post(LONG)  # stays
    computing = await pair.decode.take()
    wire = await pair.post(SHORT)
    decoding = await pair.prefilled()  # and is answered by a worker that counts as busy still
    decoding.answer("there")
    split = routing(await wire.read())["split"]
    assert (split["remote"], split["cause"]) == (True, "decode_overloaded")
    computing.answer("here")
    assert (await first.read()).status == 200


async def test_a_prompt_is_refused_when_neither_pool_takes_it(start_pair: StartPair) -> None:
    pair = await start_pair(active_prefill_tokens_threshold=BUSY)
    posted = [await pair.post(LONG)]
    prefilling = await pair.prefill.take()
    posted.append(await pair.post([1, *LONG]))
    computing = await pair.decode.take()
    wire = await pair.post([2, *LONG])
    refused = await wire.read()
    assert refused.status == 529
    assert "active_prefill_tokens_threshold 100" in refused.json()["message"]
    assert await pair.counted('cause="neither"') == 1
    computing.answer("here")
    pair.first_token(prefilling)
    (await pair.decode.take()).answer("there")
    assert [(await each.read()).status for each in posted] == [200, 200]
    assert all(s.router is not None and s.router.scheduler.load.idle for s in pair.service.models.sets())


async def test_a_client_that_leaves_leaves_nothing_booked(start_pair: StartPair) -> None:
    pair = await start_pair()
    for tokens, worker in ((LONG, pair.prefill), (SHORT, pair.decode)):
        wire = await pair.post(tokens, stream=True)
        taken = await worker.take()
        wire.close()
        await taken.cancelled.wait()
        await eventually(
            lambda: all(s.router is not None and s.router.scheduler.load.idle for s in pair.service.models.sets())
        )


async def test_prompts_that_come_at_once_see_each_other_and_go_to_both_pools(start_pair: StartPair) -> None:
    pair = await start_pair(active_prefill_tokens_threshold=BUSY)
    wire = await Wire.open(pair.service.port)
    body = {"model": "tiny", "prompt": [LONG, [1, *LONG]], "max_tokens": 9, "nvext": {"extra_fields": ["routing"]}}
    wire.post(COMPLETIONS, body)  # two prompts of one request, so of one turn
    pair.first_token(await pair.prefill.take())
    for _ in range(2):
        (await pair.decode.take()).answer("x")
    answer = await wire.read()
    assert answer.status == 200
    assert [each["split"]["cause"] for each in answer.json()["nvext"]["routing"]] == ["long", "prefill_overloaded"]


async def test_local_prompts_that_come_at_once_see_each_other_too(start_pair: StartPair) -> None:
    pair = await start_pair(active_prefill_tokens_threshold=BUSY, conditional_disagg_eff_isl_threshold=1000)
    wire = await Wire.open(pair.service.port)
    body = {"model": "tiny", "prompt": [LONG, [1, *LONG]], "max_tokens": 9, "nvext": {"extra_fields": ["routing"]}}
    wire.post(COMPLETIONS, body)
    (await pair.decode.take()).answer("here")
    (await pair.prefilled()).answer("there")
    answer = await wire.read()
    assert [each["split"]["cause"] for each in answer.json()["nvext"]["routing"]] == ["short", "decode_overloaded"]
