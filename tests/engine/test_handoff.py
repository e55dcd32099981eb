"""Is KV that a prefill worker keeps read once, in time, by the one it was made for, and given back otherwise?"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from dynamo.engine.handoff import LEASE_MARGIN_S, HandoffReply, HandoffRequest, Layout, Ledger
from dynamo.engine.takeover import Claim, Claims, Grant, Refusal, first_token_of
from dynamo.engine.transfer_metrics import DecodeMetrics, PrefillMetrics
from dynamo.llm.protocols.engine import PreprocessedRequest, Routing
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.context import Context
from dynamo.runtime.errors import InvalidArgument
from tests.engine.scripted import DEADLINE_S, eventually

ENDPOINT = "ns.prefill.handoff"
LAYOUT = Layout("test", "model", 16)
PARAMS = {"where": [1, 2, 3]}


@dataclass
class Pair:
    """Both ends on one runtime. `freed` is what the prefill engine was told to give back, and why."""

    runtime: DistributedRuntime
    ledger: Ledger
    claims: Claims
    freed: list[tuple[Any, str]] = field(default_factory=list)
    held: list[Claim] = field(default_factory=list)

    def issue(self, request: PreprocessedRequest, held_s: float = 30.0) -> dict[str, Any]:
        return self.ledger.issue(request, LAYOUT, "engine", PARAMS, held_s)

    async def claim(self, request: PreprocessedRequest, handle: Any) -> Grant | Refusal:
        answered: asyncio.Future[Grant | Refusal] = asyncio.get_running_loop().create_future()
        wanted = msgspec.structs.replace(request, prefill_result={"disaggregated_params": handle, "token_ids": [7]})
        self.held.append(self.claims.begin(wanted, answered.set_result))
        async with asyncio.timeout(DEADLINE_S):
            return await answered

    async def reason(self, request: PreprocessedRequest, handle: Any) -> str:
        answer = await self.claim(request, handle)
        assert isinstance(answer, Refusal)
        return answer.reason

    async def ask(self, request: HandoffRequest) -> HandoffReply:
        client = await self.runtime.endpoint(ENDPOINT).client()
        (answer,) = [item async for item in await client.direct(request, self.ledger.instance_id, annotated=False)]
        return msgspec.convert(answer, HandoffReply)

    def ends(self) -> list[str]:
        return [how for _, how in self.freed]


@pytest.fixture
async def pair(runtime: DistributedRuntime) -> AsyncIterator[Pair]:
    ledger = Ledger(ENDPOINT, runtime.instance_id, PrefillMetrics(runtime.metrics, ()))
    claims = Claims(runtime, DecodeMetrics(runtime.metrics, ()))
    claims.layout = LAYOUT
    both = Pair(runtime, ledger, claims)
    ledger.free = lambda params, how: both.freed.append((params, how))
    await runtime.endpoint(ENDPOINT).start_push_endpoint(ledger.handle)
    await claims.prepare(ENDPOINT)
    yield both
    ledger.close()


def request(tokens: list[int] | None = None, **routing: Any) -> PreprocessedRequest:
    return PreprocessedRequest("m", tokens or [1, 2, 3], routing=Routing(**routing) if routing else None)


async def test_a_claim_says_where_the_kv_is_and_until_when(pair: Pair) -> None:
    now = asyncio.get_running_loop().time()
    granted = await pair.claim(request(), pair.issue(request(), held_s=20.0))
    assert isinstance(granted, Grant)
    assert granted.params == PARAMS
    assert 15 < granted.deadline - now <= 20 - LEASE_MARGIN_S
    assert (pair.ledger.num_issued, pair.ledger.num_claimed) == (0, 1)


async def test_kv_that_was_read_is_forgotten(pair: Pair) -> None:
    await pair.claim(request(), pair.issue(request()))
    pair.held[0].done()
    await eventually(lambda: pair.ends() == ["read"])
    assert pair.ledger.num_claimed == 0


async def test_a_handle_is_used_once_even_if_it_was_not_read_yet(pair: Pair) -> None:
    handle = pair.issue(request())
    assert isinstance(await pair.claim(request(), handle), Grant)
    assert await pair.reason(request(), handle) == "used"
    pair.held[0].done()
    await eventually(lambda: pair.ends() == ["read"])
    assert await pair.reason(request(), handle) == "used"


async def test_of_many_claimants_one_is_granted(pair: Pair) -> None:
    handle = pair.issue(request())
    answers = await asyncio.gather(*(pair.claim(request(), handle) for _ in range(20)))
    assert sum(isinstance(answer, Grant) for answer in answers) == 1


async def test_kv_that_nobody_fetches_is_given_back_when_its_lease_ends(pair: Pair) -> None:
    handle = pair.issue(request(), held_s=0.05)
    await eventually(lambda: pair.freed == [(PARAMS, "expired")])
    assert await pair.reason(request(), handle) == "expired"


async def test_a_lease_that_is_nearly_over_is_not_granted(pair: Pair) -> None:
    assert await pair.reason(request(), pair.issue(request(), held_s=LEASE_MARGIN_S * 0.9)) == "expired"


async def test_a_release_gives_the_kv_back_at_once(pair: Pair) -> None:
    handle = pair.issue(request())
    assert (await pair.ask(HandoffRequest("release", handle["id"]))).ok
    assert pair.freed == [(PARAMS, "released")]
    assert await pair.reason(request(), handle) == "released"
    assert (await pair.ask(HandoffRequest("release", handle["id"]))).reason == "released"


async def test_only_its_reader_gives_up_what_is_claimed(pair: Pair) -> None:
    handle = pair.issue(request())
    granted = await pair.claim(request(), handle)
    assert isinstance(granted, Grant)
    assert (await pair.ask(HandoffRequest("release", handle["id"]))).reason == "claimed"
    assert pair.freed == []
    pair.held[0].cancel()
    await eventually(lambda: pair.ends() == ["released"])


async def test_a_claim_that_is_cancelled_while_it_is_asked_gives_the_kv_back(pair: Pair) -> None:
    wanted = msgspec.structs.replace(request(), prefill_result={"disaggregated_params": pair.issue(request())})
    answers: list[Any] = []
    claim = pair.claims.begin(wanted, answers.append)
    claim.cancel()
    await eventually(lambda: pair.ends() == ["released"])
    assert answers == []


async def test_a_reader_that_dies_leaves_the_kv_in_place_until_the_lease_ends(pair: Pair) -> None:
    handle = pair.issue(request(), held_s=LEASE_MARGIN_S + 0.3)
    client = await pair.runtime.endpoint(ENDPOINT).client()
    context = Context()
    asked = HandoffRequest("claim", handle["id"], handle["incarnation"], handle["digest"])
    stream = await client.direct(asked, pair.ledger.instance_id, annotated=False, context=context)
    assert (await anext(stream))["ok"]
    context.kill()
    await asyncio.sleep(0.1)  # nothing must happen
    assert pair.freed == []
    await eventually(lambda: pair.ends() == ["expired"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": {"transport": "other", "model": "model", "block_size": 16}}, "transport"),
        ({"layout": {"transport": "test", "model": "finer", "block_size": 16}}, "layout"),
        ({"layout": {"transport": "test", "model": "model", "block_size": 32}}, "layout"),
        ({"num_tokens": 4}, "length"),
        ({"digest": "0" * 32}, "digest"),
        ({"incarnation": "0" * 16}, "incarnation"),
        ({"id": "0" * 32}, "unknown"),
        ({"instance_id": 77}, "unreachable"),
        ({"endpoint": "ns.other.handoff"}, "unreachable"),
        ({"endpoint": "ns.prefill.generate"}, "unreachable"),
        ({"endpoint": "no path"}, "unreachable"),
        ({"surprise": 1}, "malformed"),
        ({"id": 5}, "malformed"),
    ],
)
async def test_a_handle_that_was_changed_is_refused(pair: Pair, change: dict[str, Any], reason: str) -> None:
    handle = pair.issue(request()) | change
    assert await pair.reason(request(), handle) == reason


@pytest.mark.parametrize("handle", [None, 7, {}, {"remote_block_ids": [[1]], "remote_engine_id": "bare vLLM"}])
async def test_what_is_no_handle_is_refused(pair: Pair, handle: Any) -> None:
    assert await pair.reason(request(), handle) == "malformed"


@pytest.mark.parametrize(
    "other", [request([1, 2, 4]), request([1, 2, 3], lora_name="a"), request([1, 2, 3], cache_salt="s")]
)
async def test_kv_of_another_prompt_adapter_or_salt_is_refused(pair: Pair, other: PreprocessedRequest) -> None:
    assert await pair.reason(other, pair.issue(request())) == "digest"


async def test_the_prefill_worker_compares_too(pair: Pair) -> None:
    handle = pair.issue(request([1, 2, 3]))
    other = request([4, 5, 6])
    forged = handle | {"digest": pair.issue(other)["digest"]}
    assert await pair.reason(other, forged) == "digest"


async def test_a_prefill_worker_that_stops_gives_everything_back(pair: Pair) -> None:
    handle, claimed = pair.issue(request()), pair.issue(request())
    await pair.claim(request(), claimed)
    pair.ledger.close()
    assert pair.ends() == ["closed", "closed"]
    assert await pair.reason(request(), handle) == "closed"


async def test_a_drain_waits_for_the_reader(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.claim(request(), pair.issue(request()))
    pair.runtime.shutdown()
    drained = asyncio.ensure_future(pair.runtime.wait_drained())
    await asyncio.sleep(0.05)  # nothing must happen
    assert not drained.done()
    pair.held[0].done()
    async with asyncio.timeout(DEADLINE_S):
        await drained
    assert pair.ends() == ["read"]


async def test_nonsense_at_the_endpoint_is_a_typed_error(pair: Pair) -> None:
    client = await pair.runtime.endpoint(ENDPOINT).client()
    with pytest.raises(InvalidArgument, match="not a handoff request"):
        [item async for item in await client.direct({"verb": "steal"}, pair.ledger.instance_id)]


async def test_metrics_show_what_is_held_and_how_it_ended(pair: Pair) -> None:
    def value(series: str) -> str:
        lines = [line for line in pair.runtime.metrics.render().decode().splitlines() if line.startswith(series)]
        return lines[0].rpartition(" ")[2] if lines else ""

    first, second = pair.issue(request()), pair.issue(request())
    await pair.claim(request(), first)
    assert value('dynamo_component_kv_handles{state="issued"}') == "1.0"
    assert value('dynamo_component_kv_handles{state="claimed"}') == "1.0"
    await pair.reason(request(), first)
    await pair.ask(HandoffRequest("release", second["id"]))
    pair.held[0].done()
    await eventually(lambda: value('dynamo_component_kv_handles_ended_total{end="read"}') == "1.0")
    assert value('dynamo_component_kv_handles_ended_total{end="released"}') == "1.0"
    assert value('dynamo_component_kv_claims_refused_total{reason="used"}') == "1.0"
    assert value('dynamo_component_kv_handles{state="claimed"}') == "0.0"


@pytest.mark.parametrize("tokens", [[1, 2], ["a"], 5])
def test_a_first_token_that_is_not_one_token_names_the_field(tokens: Any) -> None:
    wanted = PreprocessedRequest("m", [1], prefill_result={"token_ids": tokens})
    with pytest.raises(InvalidArgument, match=r"prefill_result\.token_ids") as wrong:
        first_token_of(wanted)
    assert wrong.value.param == "prefill_result"
