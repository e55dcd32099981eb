"""How does an attached server run as a program? `python -m dynamo.attach http://host:8000`."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import msgspec

from dynamo.attach.args import AttachOptions, parse_args, tls_context
from dynamo.attach.monitor import Monitor
from dynamo.attach.plan import Plan, make_plan
from dynamo.attach.probe import Identity, ServerFacts
from dynamo.attach.server import OpenAIServer
from dynamo.attach.worker import Attached, make_worker
from dynamo.engine.program import run_program, say_ready
from dynamo.engine.worker_args import dump_config
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import CannotConnect, ConnectionTimeout, Disconnected, EngineShutdown

log = logging.getLogger(__name__)

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    options = parse_args(argv)
    return run_program("attach", options.worker, lambda runtime: serve(runtime, options))


async def serve(runtime: DistributedRuntime, options: AttachOptions) -> int:
    """Offer the server whenever it is there, until the runtime has shut down. Returns the exit status.

    Raises:
        ValueError: the server is not one that can be attached so; says what to do.
        DynamoException: discovery or the request plane cannot be used.
    """
    dump_config(options.worker.dump_config_to, options.shown())
    server = OpenAIServer(options.url, options.api_key, tls_context(options))
    try:
        return await Attachment(runtime, server, options).run()
    finally:
        await server.close()


class Attachment:
    """One server over the time: each time it comes back it is a new worker, with a new instance id, because nothing
    that was known of the old one's cache or load holds for it."""

    def __init__(self, runtime: DistributedRuntime, server: OpenAIServer, options: AttachOptions) -> None:
        self._runtime = runtime
        self._server = server
        self._options = options
        self._monitor = Monitor(server, options.served_model)
        self._identity: Identity | None = None

    async def run(self) -> int:
        """See `serve`."""
        instance_id = self._runtime.instance_id
        while True:
            found = await self._unless_shutdown(self._find())
            if found is None:
                return 0
            attached = Attached(self._runtime, self._server, self._options, *found, self._monitor, instance_id)
            status = await self._serve(attached)
            if status is not None:
                return status
            instance_id = secrets.randbelow((1 << 63) - 1) + 1

    async def _find(self) -> tuple[ServerFacts, Plan]:
        """Wait until the server is there, and decide how to use it."""
        while True:
            facts = await self._monitor.until_back(self._identity)
            if self._options.block_size is not None:
                facts = msgspec.structs.replace(facts, block_size=self._options.block_size)
            try:
                plan = await make_plan(self._server, facts, self._options)
            except (CannotConnect, Disconnected, ConnectionTimeout) as e:
                log.error("%s", e)  # noqa: TRY400 - it went again while it was looked at
                await asyncio.sleep(1.0)
                continue
            self._identity = facts.identity
            return facts, plan

    async def _serve(self, attached: Attached) -> int | None:
        """Offer the server until it goes; gives the exit status if the process is to end before."""
        print(f"attach found {attached.facts.url}: {attached.facts}; {attached.plan}", flush=True)
        for warning in (*attached.plan.warnings, *_kv_warnings(attached)):
            log.warning("%s", warning)
        worker = make_worker(attached)
        try:
            if not await worker.start():
                return 0
        except EngineShutdown:
            if not self._runtime.is_shutting_down():
                raise
            return 0
        say_ready("attach", attached.model_name, self._options.worker)
        reason = await self._unless_shutdown(self._monitor.until_down(attached.facts.identity))
        if reason is None:
            return await worker.run()
        log.error("%s; leaving until it is back", reason)
        await worker.leave(reason)
        return None

    async def _unless_shutdown(self, work: Awaitable[T]) -> T | None:
        """The outcome of `work`, None if the runtime is told to end first."""
        task = asyncio.ensure_future(work)
        shutdown = asyncio.ensure_future(self._runtime.wait_shutdown())
        try:
            await asyncio.wait((task, shutdown), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, shutdown):
                each.cancel()
            await asyncio.gather(task, shutdown, return_exceptions=True)


def _kv_warnings(attached: Attached) -> list[str]:
    """Everything that keeps KV routing from being exact: it must never be quietly so."""
    facts, options = attached.facts, attached.options
    if not attached.plan.sends_tokens:
        if options.kv_events:
            return ["--kv-events: not used: without tokens a router cannot tell what of a prompt is cached"]
        return []
    found = []
    if not options.kv_events:
        found.append(
            "KV routing will be approximate: without --kv-events routers know only what they sent here themselves"
        )
    elif facts.prefix_caching is False:
        found.append("--kv-events: not used: prefix caching is off in the server (--enable-prefix-caching)")
    elif facts.block_size is None:
        found.append("--kv-events: not used: the server does not tell its block size; give it with --block-size")
    elif not options.kv_replay:
        found.append("without --kv-replay, KV events that are lost on the way empty the routers' view of this worker")
    if facts.block_size == 1:
        found.append("KV blocks of one token make hashing a prompt slow; start SGLang with --page-size 16 or more")
    if not facts.has_metrics:
        found.append("the server has no /metrics: its load from others is unknown (SGLang: --enable-metrics)")
    return found
