"""What becomes of KV at a prefill worker while its request waits in the router's queue for a decode worker?"""

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo.frontend.service import FrontendService
from dynamo.llm.model_card import ModelRuntimeConfig, WorkerType
from tests.frontend.front_door import CHAT, ScriptedWorker, StartFrontend, StartWorker, Taken, Wire, changed, chat
from tests.frontend.front_door import model_ready as ready
from tests.frontend.kv_fleet import BLOCK, eventually, kv

LEASE_S = 0.3
LONG = "red green blue cat dog sun rain " * 40  # far over one step of the workers here


class Queue(NamedTuple):
    """A frontend whose only decode worker is busy, and a request behind it whose prompt is computed."""

    service: FrontendService
    decode: ScriptedWorker
    busy: Taken
    first: Wire
    waiting: Wire
    handoff: "asyncio.Queue[Any]"
    handle: dict[str, Any]

    def pending(self) -> int:
        """Requests in the queue for a decode worker."""
        return sum(s.router.queue.pending for s in self.service.models.sets() if s.router is not None)


@pytest.fixture
async def queue(start_frontend: StartFrontend, start_worker: StartWorker, tmp_path: Path) -> Queue:
    policy = tmp_path / "policy.yaml"
    policy.write_text("policy_classes: [{name: default, prefill_busy_threshold: 0}]")
    service = await start_frontend(**kv(router_policy_config=str(policy)))
    facts = ModelRuntimeConfig(total_kv_blocks=1000, max_num_batched_tokens=100, kv_event_publishing_enabled=True)
    sized = {"kv_cache_block_size": BLOCK, "runtime_config": facts}
    decode = await start_worker(worker_type=WorkerType.Decode, **sized)
    prefill = await start_worker(endpoint="dynamo.prefill.generate", worker_type=WorkerType.Prefill, **sized)
    asked: asyncio.Queue[Any] = asyncio.Queue()

    async def handoff(request: Any) -> Any:
        asked.put_nowait(request)
        yield {"ok": True, "remaining_s": LEASE_S}

    await prefill.runtime.endpoint("dynamo.prefill.handoff").start_endpoint(handoff)
    await ready(service, "tiny", workers=2)
    await changed(service, lambda: any(s.prefill is not None for s in service.models.sets()))
    first = await Wire.open(service.port)
    first.post(CHAT, chat(LONG, max_tokens=9))
    (await prefill.take()).send(finish_reason="error")  # so that the decode worker has the prompt to compute
    busy = await decode.take()
    waiting = await Wire.open(service.port)
    waiting.post(CHAT, chat("another " + LONG, max_tokens=9, stream=True))
    computed = await prefill.take()
    handle = {"id": "h", "incarnation": "i", "endpoint": "dynamo.prefill.handoff", "lease_s": LEASE_S}
    handle["instance_id"] = prefill.instance_id
    token = computed._tokenizer.encode("yes")[:1]
    computed.send(token_ids=token, finish_reason="length", disaggregated_params=handle)
    computed.stream.end()
    made = Queue(service, decode, busy, first, waiting, asked, handle)
    await eventually(lambda: made.pending() == 1)
    return made


async def test_its_lease_is_renewed_until_a_decode_worker_has_the_request(queue: Queue) -> None:
    async with asyncio.timeout(10):
        for _ in range(9):  # three leases
            assert await queue.handoff.get() == {"verb": "renew", "id": "h", "incarnation": "i"}
    queue.busy.answer("done")
    decoding = await queue.decode.take()
    assert decoding.request.prefill_result is not None
    assert decoding.request.prefill_result["disaggregated_params"] == queue.handle
    while not queue.handoff.empty():
        queue.handoff.get_nowait()
    await asyncio.sleep(2 * LEASE_S)  # nothing must happen: it is the decode worker's now
    assert queue.handoff.empty()
    decoding.answer("rest")


async def test_a_client_that_leaves_the_queue_gives_it_back(queue: Queue) -> None:
    queue.waiting.close()
    async with asyncio.timeout(10):
        while (asked := await queue.handoff.get())["verb"] == "renew":
            pass
    assert asked == {"verb": "release", "id": "h", "incarnation": "i"}
    await eventually(lambda: queue.pending() == 0)
    await asyncio.sleep(LEASE_S)  # nothing must happen
    assert queue.handoff.empty()
    queue.busy.answer("done")
