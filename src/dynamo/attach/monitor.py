"""Can the server answer, and is it still the one it was?

Asked every two seconds, and at once when a request met a broken connection.
"""

import asyncio
import contextlib
import logging

from dynamo.attach.probe import Identity, NotAServer, ServerFacts, probe, served_models
from dynamo.attach.server import OpenAIServer, error_words
from dynamo.runtime.errors import ConnectionTimeout, DynamoException, WorkerUnavailable

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
CHECK_TIMEOUT_S = 5.0  # a loaded server answers its health check late; SGLang's makes a token, which takes a second
SILENT_CHECKS = 3  # so many in a row without an answer mean that it hangs
NO_HEALTH_PATH = (404, 405)  # some servers have none; then /v1/models alone tells


class Monitor:
    """Looks after one server. `wanted` is the model to serve, if the operator named it."""

    def __init__(self, server: OpenAIServer, wanted: str | None) -> None:
        self._server = server
        self._wanted = wanted
        self._suspected = asyncio.Event()
        self._restart: str | None = None
        self._refused: str | None = None
        self._began_at: float | None = None
        self._several = False

    def suspect(self, reason: str) -> None:
        """A request could not be served: look at once."""
        log.debug("suspecting the server: %s", reason)
        self._suspected.set()

    def process_began(self, began_at: float | None) -> None:
        """The server's process says when it began (Unix time): later than before means that it was restarted."""
        newest, self._began_at = self._began_at, max(began_at or 0.0, self._began_at or 0.0) or None
        if began_at is None or newest is None or began_at == newest:
            return
        if began_at > newest:
            self._restart = "the server was restarted"
            self._suspected.set()
        elif not self._several:
            self._several = True
            log.error("several servers answer at %s in turn: attach each of them by itself", self._server.url)

    async def until_down(self, identity: Identity) -> str:
        """Return why the server cannot be used any more. `identity` is what it must be."""
        silent = 0
        while True:
            await self._pause()
            if self._restart is not None:
                reason, self._restart = self._restart, None
                return reason
            try:
                await self._check(identity)
                silent = 0
            except ConnectionTimeout as e:
                silent += 1
                if silent == SILENT_CHECKS:
                    return e.message
            except (DynamoException, NotAServer) as e:
                return str(e)

    async def until_back(self, identity: Identity | None) -> ServerFacts:
        """Wait until the server answers, and is what it was; `identity` None takes whatever is there.

        Raises:
            NotAServer: without `identity`: something answers that cannot be used.
        """
        while True:
            try:
                facts = await self._look(identity)
            except NotAServer as e:
                if identity is None:
                    raise
                self._complain(str(e))
            except DynamoException as e:
                self._complain(f"{e}; trying on every {INTERVAL_S:g} s")
            else:
                self._refused = None
                self.process_began(facts.started_at)
                self._restart = None  # it is known as it is now
                return facts
            await self._pause()

    async def _look(self, identity: Identity | None) -> ServerFacts:
        if identity is None:
            return await probe(self._server, self._wanted)
        await self._check(identity)
        facts = await probe(self._server, identity.model)
        if facts.identity != identity:
            raise self._another(str(facts.identity), identity)
        return facts

    def _another(self, found: str, expected: Identity) -> NotAServer:
        return NotAServer(f"another model is at {self._server.url}: {found} instead of {expected}; it is not served")

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL_S):
                await self._suspected.wait()
        self._suspected.clear()

    async def _check(self, identity: Identity) -> None:
        """Raises DynamoException or NotAServer saying what is the matter."""
        health = await self._server.get("/health", CHECK_TIMEOUT_S)
        if health.status != 200 and health.status not in NO_HEALTH_PATH:
            words = error_words(health.body).message
            raise WorkerUnavailable(f"{self._server.url}/health answers {health.status} {words}".rstrip())
        models = await served_models(self._server, CHECK_TIMEOUT_S)
        same = [model for model in models if model.id == identity.model and model.parent is None]
        if not same:
            raise self._another(", ".join(model.id for model in models) or "none", identity)
        root = same[0].root
        if root != identity.root and root != identity.model:  # SGLang lists its name as the root
            raise self._another(f"{identity.model} ({root})", identity)

    def _complain(self, reason: str) -> None:
        """Say what is the matter, once for each thing that is."""
        if reason != self._refused:
            self._refused = reason
            log.error("%s", reason)
