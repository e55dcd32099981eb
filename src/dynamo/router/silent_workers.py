"""Of which workers will it never be known what they have cached, and why?

KV routing without that knowledge would work worse and look as if it worked: it is said loudly, once for each reason.
"""

import logging
from collections.abc import Iterable

from dynamo.llm.model_card import ModelDeploymentCard
from dynamo.router.types import WorkerKey

log = logging.getLogger(__name__)


class SilentWorkers(dict[WorkerKey, str]):
    """The workers whose cache cannot be known -> why. `uses_events`: whether the router believes what workers say."""

    def __init__(self, model: str, block_size: int, *, uses_events: bool) -> None:
        super().__init__()
        self._model = model
        self._block_size = block_size
        self._uses_events = uses_events

    def check(self, workers: Iterable[WorkerKey], card: ModelDeploymentCard) -> None:
        """Look at the ranks of one worker, by its card."""
        why = self._why(card)
        for worker in workers:
            if why is None:
                self.pop(worker, None)
            elif self.get(worker) != why:
                self[worker] = why
                log.error(
                    "KV routing of %s does not know what worker %x, rank %d has cached: %s", self._model, *worker, why
                )

    def _why(self, card: ModelDeploymentCard) -> str | None:
        size = card.kv_cache_block_size
        if size is not None and size != self._block_size:
            return f"its KV blocks have {size} tokens, this router's {self._block_size}. Give both the same size"
        if self._uses_events and not card.runtime_config.kv_event_publishing_enabled:
            return (
                "it publishes no KV events, so requests go there by load alone. Start it with prefix caching and KV "
                "events, or this router with --no-router-kv-events to guess from what it sends"
            )
        return None
