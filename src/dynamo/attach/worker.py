"""How is the server offered as a worker, and taken back when it goes?

In tokens mode it is an engine like any other (`dynamo.engine.serving`); in openai mode a worker that takes requests
byte for byte. Both can `leave`, which ends what is in flight with EngineShutdown, while the process goes on.
"""

from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Protocol

import msgspec

from dynamo.attach.args import AttachOptions
from dynamo.attach.kv_feed import KvFeed
from dynamo.attach.load_watch import LoadWatch
from dynamo.attach.monitor import Monitor
from dynamo.attach.plan import Plan
from dynamo.attach.probe import ServerFacts
from dynamo.attach.proxy import Proxy
from dynamo.attach.server import OpenAIServer
from dynamo.attach.token_engine import TokenEngine
from dynamo.engine.admission import Admission, engine_request_limit
from dynamo.engine.contract import EngineConfig
from dynamo.engine.gauges import EngineGauges
from dynamo.engine.reports import Reports
from dynamo.engine.seat import InstanceEndpoint
from dynamo.engine.serving import EngineWorker, ServeOptions
from dynamo.llm.model_card import ModelInput, ModelRuntimeConfig, ModelType
from dynamo.llm.protocols.passthrough import OPENAI_BYTES, OpenAIRequest
from dynamo.llm.registration import register_model, unregister_model
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.component import ServedEndpoint

_MODEL_TYPES = {"chat": ModelType.Chat, "completions": ModelType.Completions}


class Attached(msgspec.Struct, frozen=True):
    """What a worker is made of."""

    runtime: DistributedRuntime
    server: OpenAIServer
    options: AttachOptions
    facts: ServerFacts
    plan: Plan
    monitor: Monitor
    instance_id: int

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.options.model_name or self.facts.model

    @property
    def publishes_kv_events(self) -> bool:
        """Whether routers will hear of its cache."""
        wanted = self.plan.sends_tokens and self.options.kv_events is not None
        return wanted and self.facts.block_size is not None and self.facts.prefix_caching is not False

    def config(self) -> EngineConfig:
        """The server in an engine's words."""
        facts = self.facts
        aliases = facts.other_names if self.options.model_name is None else []
        if not self.plan.sends_tokens:
            aliases = [*aliases, *facts.adapters]
        return EngineConfig(
            model=facts.identity.root or facts.model,
            served_model_name=self.model_name,
            model_aliases=aliases,
            context_length=facts.max_model_len,
            kv_cache_block_size=facts.block_size,
            total_kv_blocks=facts.total_blocks,
            data_parallel_size=facts.ranks,
            publishes_kv_events=self.publishes_kv_events,
            runtime_data=_runtime_data(facts),
        )


def _runtime_data(facts: ServerFacts) -> dict[str, Any]:
    return {"engine": facts.engine, "version": facts.version, "attached": facts.url}


class AttachedWorker(Protocol):
    """A server being offered."""

    async def start(self) -> bool:
        """Offer it. False if the process was told to end meanwhile. Raises DynamoException, ValueError."""
        ...

    async def leave(self, reason: str) -> None:
        """Take it back at once; what is in flight fails with EngineShutdown."""
        ...

    async def run(self) -> int:
        """Wait for the end of the process, in order. Returns the exit status."""
        ...


def make_worker(attached: Attached) -> AttachedWorker:
    """The worker for the plan's mode."""
    return TokenWorker(attached) if attached.plan.sends_tokens else BytesWorker(attached)


class TokenWorker(EngineWorker):
    """A server that is sent tokens."""

    def __init__(self, attached: Attached) -> None:
        plan = attached.plan
        assert plan.dialect is not None
        assert plan.directory is not None
        self._attached = attached
        self._tokens = TokenEngine(attached.server, plan.dialect, attached.config(), attached.monitor.suspect)
        options = ServeOptions(plan.directory, attached.options.worker, attached.instance_id)
        super().__init__(attached.runtime, self._tokens, options)
        self._feed: KvFeed | None = None
        self._load: LoadWatch | None = None

    async def start(self) -> bool:
        """See `AttachedWorker`."""
        if not await super().start():
            return False
        attached = self._attached
        self._load = LoadWatch(
            attached.server,
            attached.facts,
            self.on_load,
            lambda: self._tokens.prefill_tokens,
            attached.monitor.process_began,
        )
        if attached.publishes_kv_events:
            # Only now: what is replayed before there is a publisher would be lost.
            self._feed = KvFeed(attached.server, attached.facts, attached.options, self)
        return True

    async def leave(self, reason: str) -> None:
        """See `AttachedWorker`."""
        self.dispatcher.close(reason)
        await self._stop_serving()
        await self._withdraw(self._seat)
        await self._stop_engine()

    async def _stop_engine(self) -> None:
        for watching in (self._feed, self._load):
            if watching is not None:
                await watching.close()
        await super()._stop_engine()


class BytesWorker:
    """A server that is passed OpenAI's bytes."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self.config = attached.config()
        worker = attached.options.worker
        self.endpoint = InstanceEndpoint(attached.runtime.endpoint(worker.endpoint), attached.instance_id)
        metrics = attached.runtime.metrics
        gauges = EngineGauges(metrics, self.endpoint, attached.instance_id, self.config)
        admission = Admission(
            engine_request_limit(worker.engine_request_limit, self.config),
            worker.request_queue_limit,
            metrics.admission.engine_requests,
            metrics.admission.queued_requests,
            metrics.admission.rejected,
        )
        names = {attached.model_name: attached.facts.model}
        self.proxy = Proxy(
            attached.server,
            admission,
            {} if attached.model_name == attached.facts.model else names,
            attached.monitor.suspect,
        )
        self._reports = Reports(
            self.endpoint, attached.instance_id, self.config, gauges, waiting=lambda: self.proxy.num_queued
        )
        self._served: ServedEndpoint | None = None
        self._load: LoadWatch | None = None

    async def start(self) -> bool:
        """See `AttachedWorker`."""
        attached = self._attached
        try:
            await self._reports.start()
            self._served = await self.endpoint.start_push_endpoint(
                self.proxy.handle,
                metrics_labels=[("model", attached.model_name)],
                health_check_payload=attached.options.worker.health_check_payload or self._canary(),
                instance_id=attached.instance_id,
            )
            await self._register()
        except BaseException:
            await self.leave("it could not be offered")
            raise
        self._load = LoadWatch(
            attached.server, attached.facts, self._reports.load, lambda: 0, attached.monitor.process_began
        )
        return True

    async def _register(self) -> None:
        attached, config = self._attached, self.config
        await register_model(
            ModelInput.Text,
            reduce(or_, (_MODEL_TYPES[word] for word in attached.options.worker.endpoint_types)),
            self.endpoint,
            Path(config.model),
            attached.model_name,
            kv_cache_block_size=config.kv_cache_block_size,
            runtime_config=ModelRuntimeConfig(
                context_length=config.context_length,
                total_kv_blocks=config.total_kv_blocks,
                data_parallel_size=config.data_parallel_size,
                enable_local_indexer=False,
                kv_event_publishing_enabled=False,
                runtime_data={**config.runtime_data, OPENAI_BYTES: True},
            ),
            model_aliases=config.model_aliases or None,
            skip_model_assets=True,
        )

    def _canary(self) -> dict[str, Any]:
        """The least that the server answers."""
        body = {"model": self._attached.facts.model, "prompt": "a", "max_tokens": 1}
        request = OpenAIRequest("/v1/completions", msgspec.json.encode(body), [("Content-Type", "application/json")])
        return {name: getattr(request, name) for name in request.__struct_fields__}

    async def leave(self, reason: str) -> None:
        """See `AttachedWorker`."""
        self.proxy.close(reason)
        if self._served is not None:
            await self._served.stop()
        await unregister_model(self.endpoint)
        await self._close()

    async def run(self) -> int:
        """See `AttachedWorker`."""
        runtime = self._attached.runtime
        await runtime.wait_shutdown()
        await unregister_model(self.endpoint)
        await runtime.wait_drained()
        await self._close()
        return 0

    async def _close(self) -> None:
        if self._load is not None:
            await self._load.close()
        await self._reports.close()
