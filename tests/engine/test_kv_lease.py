"""Does KV stay as long as somebody waits for it, and not longer?"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from dynamo.engine import handoff, takeover
from dynamo.engine.handoff import HandoffReply, HandoffRequest, Layout, Ledger
from dynamo.engine.takeover import Claims, Grant, Refusal
from dynamo.engine.transfer_metrics import DecodeMetrics, PrefillMetrics
from dynamo.llm import kv_lease
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.runtime import DistributedRuntime
from tests.engine.scripted import DEADLINE_S, eventually

ENDPOINT = "ns.prefill.handoff"
LAYOUT = Layout("test", "model", 16)
LEASE_S = 0.6
PROMPT = PreprocessedRequest("m", [1, 2, 3])


@dataclass
class Prefill:
    """A prefill worker's side, and the decode worker's claims. `freed` is how each handle ended, and when."""

    runtime: DistributedRuntime
    ledger: Ledger
    claims: Claims
    freed: list[tuple[str, float]] = field(default_factory=list)

    def issue(self, lease_s: float = LEASE_S) -> dict[str, Any]:
        return self.ledger.issue(PROMPT, LAYOUT, "engine", {"where": 1}, LEASE_S, lease_s=lease_s)

    async def ask(self, verb: Any, handle: dict[str, Any], **more: Any) -> HandoffReply:
        request = HandoffRequest(verb, handle["id"], handle["incarnation"], handle["digest"], **more)
        client = await self.runtime.endpoint(ENDPOINT).client()
        (answer,) = [item async for item in await client.direct(request, self.ledger.instance_id, annotated=False)]
        return msgspec.convert(answer, HandoffReply)

    async def find(self, endpoint: str) -> Any:
        return await self.runtime.endpoint(endpoint).client()


@pytest.fixture(params=["mem"])
async def prefill(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> AsyncIterator[Prefill]:
    for module in (handoff, takeover):
        monkeypatch.setattr(module, "LEASE_MARGIN_S", 0.05)
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    runtime = DistributedRuntime(discovery_backend=request.param)
    ledger = Ledger(ENDPOINT, runtime.instance_id, PrefillMetrics(runtime.metrics, ()))
    claims = Claims(runtime, DecodeMetrics(runtime.metrics, ()))
    claims.layout = LAYOUT
    both = Prefill(runtime, ledger, claims)
    ledger.free = lambda params, how: both.freed.append((how, time.monotonic()))
    await runtime.endpoint(ENDPOINT).start_push_endpoint(ledger.handle)
    await claims.prepare(ENDPOINT)
    yield both
    ledger.close()
    await runtime.close()


async def test_what_is_waited_for_stays_and_is_free_a_lease_after_its_holder_stopped(prefill: Prefill) -> None:
    keeping = kv_lease.keep(prefill.issue(), prefill.find)
    assert keeping is not None
    await asyncio.sleep(3 * LEASE_S)
    assert prefill.freed == []
    stopped = time.monotonic()
    keeping.stop()
    await eventually(lambda: [how for how, _ in prefill.freed] == ["expired"])
    assert prefill.freed[0][1] - stopped <= LEASE_S + 0.2


HOLDER = """
import asyncio, json, sys
from dynamo.llm import kv_lease
from dynamo.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(discovery_backend="file")
    handle = json.loads(sys.argv[1])
    async def find(endpoint):
        client = await runtime.endpoint(endpoint).client()
        await client.wait_for_instances(5)
        return client
    client = await find(handle["endpoint"])
    renewal = {"id": handle["id"], "incarnation": handle["incarnation"]}
    heard = lambda until: print("renewed", flush=True)
    kv_lease.Keeping(lambda: find(handle["endpoint"]), handle["instance_id"], renewal, handle["lease_s"], 0.0, heard)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("prefill", ["file"], indirect=True)
async def test_what_a_killed_process_waited_for_is_free_a_lease_later(prefill: Prefill) -> None:
    handle = prefill.ledger.issue(PROMPT, LAYOUT, "engine", {}, DEADLINE_S, lease_s=LEASE_S)
    entry = prefill.ledger._entries[handle["id"]]
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, msgspec.json.encode(handle).decode(), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    async with asyncio.timeout(30):
        assert await holder.stdout.readline() == b"renewed\n"  # it has begun; from here on by its renewals alone
        entry.held_until = 0.0
        for _ in range(5):
            assert await holder.stdout.readline() == b"renewed\n"
    assert prefill.freed == []
    killed = time.monotonic()
    holder.kill()
    await eventually(lambda: [how for how, _ in prefill.freed] == ["expired"])
    assert prefill.freed[0][1] - killed <= LEASE_S + 0.2
    await holder.wait()


async def test_a_claim_whose_engine_takes_its_time_may_be_read_for_as_long(prefill: Prefill) -> None:
    answers: list[Grant | Refusal] = []
    told: list[float] = []
    wanted = msgspec.structs.replace(PROMPT, prefill_result={"disaggregated_params": prefill.issue()})
    claim = prefill.claims.begin(wanted, answers.append, lambda grant: told.append(grant.deadline))
    await eventually(lambda: len(answers) == 1)
    grant = answers[0]
    assert isinstance(grant, Grant)
    first = grant.deadline
    await asyncio.sleep(3 * LEASE_S)
    assert prefill.freed == []
    assert grant.deadline > time.monotonic() > first
    assert told == sorted(told)
    assert told[-1] == grant.deadline
    entry = prefill.ledger._entries[grant.handle.id]
    assert grant.deadline <= entry.held_until - takeover.LEASE_MARGIN_S
    claim.done()
    await eventually(lambda: [how for how, _ in prefill.freed] == ["read"])


async def test_a_claim_that_is_given_up_is_not_renewed(prefill: Prefill) -> None:
    answers: list[Grant | Refusal] = []
    wanted = msgspec.structs.replace(PROMPT, prefill_result={"disaggregated_params": prefill.issue()})
    claim = prefill.claims.begin(wanted, answers.append)
    await eventually(lambda: len(answers) == 1)
    claim.cancel()
    await eventually(lambda: [how for how, _ in prefill.freed] == ["released"])


async def test_nobody_else_renews_what_is_claimed(prefill: Prefill) -> None:
    handle = prefill.issue()
    granted = prefill.ledger.claim(HandoffRequest("claim", handle["id"], handle["incarnation"], handle["digest"]))
    assert granted.ok
    assert (await prefill.ask("renew", handle)).reason == "claimed"
    assert (await prefill.ask("renew", handle, claim_id="guessed")).reason == "claimed"
    assert (await prefill.ask("renew", handle, claim_id=granted.claim_id)).ok


async def test_a_renewal_of_what_is_gone_foreign_or_fixed_says_so(prefill: Prefill) -> None:
    handle, fixed = prefill.issue(), prefill.issue(lease_s=0.0)
    assert (await prefill.ask("renew", handle | {"id": "other"})).reason == "unknown"
    assert (await prefill.ask("renew", handle | {"incarnation": "before"})).reason == "incarnation"
    assert (await prefill.ask("renew", fixed)).reason == "fixed"
    assert kv_lease.keep(fixed, prefill.find) is None
    assert kv_lease.keep({"lease_s": "x"}, prefill.find) is None
    await prefill.ask("release", handle)
    assert (await prefill.ask("renew", handle)).reason == "released"


async def test_nobody_holds_kv_for_ever(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "MAX_HELD_S", 2 * LEASE_S)
    began = time.monotonic()
    keeping = kv_lease.keep(prefill.issue(), prefill.find)
    assert keeping is not None
    await eventually(lambda: [how for how, _ in prefill.freed] == ["expired"])
    assert LEASE_S < prefill.freed[0][1] - began <= 2 * LEASE_S + 0.2
    keeping.stop()


async def test_the_engine_says_how_long_it_keeps_it(prefill: Prefill) -> None:
    replies: list[float | None] = [2.0, 0.0, None]

    async def extend(params: Any) -> float | None:
        assert params == {"where": 1}
        return replies.pop(0)

    prefill.ledger.extend = extend
    handle = prefill.issue()
    assert 1.5 < (await prefill.ask("renew", handle)).remaining_s <= 2.0
    assert 1.0 < (await prefill.ask("renew", handle)).remaining_s <= 2.0  # it did not know: as it was
    assert (await prefill.ask("renew", handle)).reason == "expired"
    text = prefill.runtime.metrics.render().decode()
    assert "dynamo_component_kv_lease_renewals_total 2.0" in text
