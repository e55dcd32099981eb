"""How busy is the server, once a second?"""

import asyncio
import logging
from collections.abc import Callable

from dynamo.attach.probe import ServerFacts, fetch_metrics
from dynamo.attach.server import OpenAIServer
from dynamo.llm.kv_events import LoadMetrics
from dynamo.runtime.errors import DynamoException

log = logging.getLogger(__name__)

INTERVAL_S = 1.0  # routers count what they send themselves; this is for what others send


class LoadWatch:
    """Reads /metrics for as long as the server is attached.

    Args:
        report: gets each rank's load; its worker id is not set.
        prefill_tokens: prompt tokens of our requests that have no first token yet.
        began: hears when the server's process says that it began.
    """

    def __init__(
        self,
        server: OpenAIServer,
        facts: ServerFacts,
        report: Callable[[LoadMetrics], None],
        prefill_tokens: Callable[[], int],
        began: Callable[[float | None], None],
    ) -> None:
        self._server = server
        self._facts = facts
        self._report = report
        self._prefill_tokens = prefill_tokens
        self._began = began
        self._task = asyncio.get_running_loop().create_task(self._run(), name="server load")

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except DynamoException as e:
                log.debug("no load this time: %s", e)  # the monitor says what is the matter
            await asyncio.sleep(INTERVAL_S)

    async def _look(self) -> None:
        metrics = await fetch_metrics(self._server)
        if metrics is None:
            return
        self._began(metrics.started_at)
        for rank, load in metrics.ranks.items():
            blocks = round(load.usage * (self._facts.total_blocks or 0))
            self._report(
                LoadMetrics(
                    worker_id=0,
                    dp_rank=rank,
                    active_decode_blocks=blocks,
                    active_prefill_tokens=self._prefill_tokens() if rank == 0 else 0,
                    kv_used_blocks=blocks,
                    running_requests=load.running,
                    waiting_requests=load.waiting,
                )
            )

    async def close(self) -> None:
        """Look no more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
