"""How do the server's KV events become the worker's?

One relay a data parallel rank (port and rank count up together). An engine that publishes nothing looks like one whose
cache is empty, so at the start a prompt is sent that must be heard of.
"""

import asyncio
import logging
import random
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import zmq

from dynamo.attach.args import AttachOptions
from dynamo.attach.probe import ServerFacts
from dynamo.attach.server import OpenAIServer
from dynamo.engine.contract import EngineCallbacks
from dynamo.engine.zmq_kv_events import KvEventRelay, TieredEvents, local_endpoint
from dynamo.runtime.errors import DynamoException

log = logging.getLogger(__name__)

QUIET_S = 1.0  # for the subscription to be made, and for events of others to be heard
HEARD_WITHIN_S = 10.0  # from a prompt's end to its event: milliseconds, or a queue before it
SILENCE = """\
no KV event was heard from %s although a block was filled. Is the server started with this port in \
--kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:PORT"}', and is its \
topic that of --kv-topic? Until events come, routers know only what they sent here themselves"""


class KvFeed:
    """The relays of one server. Raises ValueError if an endpoint is none."""

    def __init__(self, server: OpenAIServer, facts: ServerFacts, options: AttachOptions, told: EngineCallbacks) -> None:
        assert options.kv_events is not None
        self._server = server
        self._facts = facts
        self._endpoint = options.kv_events
        self._told = told
        self._block_size = facts.block_size
        self._relays: list[KvEventRelay] = []
        self._heard = asyncio.Event()
        try:
            for rank in range(facts.ranks):
                replay = local_endpoint(options.kv_replay, rank) if options.kv_replay else None
                relay = KvEventRelay(
                    local_endpoint(options.kv_events, rank),
                    replay,
                    options.kv_topic,
                    partial(self._on_events, rank),
                    block_size=facts.block_size,
                    catch_up=True,
                )
                self._relays.append(relay)
        except zmq.ZMQError as e:
            raise ValueError(f"--kv-events: {options.kv_events}: {e}") from None
        self._checking = asyncio.get_running_loop().create_task(self._check(), name="kv event check")

    def _on_events(self, rank: int, found: TieredEvents) -> None:
        self._heard.set()
        for tier, run in groupby(found, key=itemgetter(0)):
            self._told.on_kv_events([event for _, event in run], rank, tier)

    async def _check(self) -> None:
        """Say loudly if nothing is heard."""
        await asyncio.sleep(QUIET_S)
        if self._heard.is_set():
            return
        try:
            await self._make_a_block()
            async with asyncio.timeout(HEARD_WITHIN_S):
                await self._heard.wait()
            log.info("KV events are heard from %s", self._endpoint)
        except DynamoException as e:
            log.warning("could not check that KV events are heard from %s: %s", self._endpoint, e)
        except TimeoutError:
            log.error(SILENCE, self._endpoint)  # noqa: TRY400 - the traceback says nothing

    async def _make_a_block(self) -> None:
        """One token after a block of tokens that nobody else has."""
        length = (self._block_size or 16) + 1
        body: dict[str, Any] = {
            "model": self._facts.model,
            "prompt": [random.randint(1, 100) for _ in range(length)],  # ids that every vocabulary has
            "max_tokens": 1,
        }
        if self._facts.engine == "vllm":
            body["cache_salt"] = f"dynamo-attach-{random.getrandbits(64):x}"
        await self._server.post("/v1/completions", body, timeout_s=60.0)

    async def close(self) -> None:
        """Hear no more."""
        self._checking.cancel()
        await asyncio.gather(self._checking, return_exceptions=True)
        for relay in self._relays:
            await relay.close()
