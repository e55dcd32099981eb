"""Is the frontend alive, who is behind it, what has it counted, and what can it be asked?"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from dynamo.frontend.args import Limits
from dynamo.frontend.http1 import Request, Sent
from dynamo.frontend.metrics import FrontendMetrics
from dynamo.frontend.models import ModelRegistry
from dynamo.frontend.server import answer
from dynamo.frontend.siblings import Siblings
from dynamo.runtime.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from dynamo.frontend.openapi import Description


class SystemRoutes:
    """The handlers of `/health`, `/live`, `/metrics`, `/openapi.json` and `/docs` [H5]."""

    def __init__(
        self, models: ModelRegistry, metrics: FrontendMetrics, path_of: Mapping[str, str], limits: Limits
    ) -> None:
        self.draining = False
        self.siblings: Siblings | None = None
        """The other processes of the port, where there are some."""
        self._models = models
        self._metrics = metrics
        self._path_of = path_of
        self._limits = limits

    @cached_property
    def _description(self) -> "Description":
        """Made when somebody asks: it costs a tenth of a second, which no start needs to wait for."""
        from dynamo.frontend.openapi import describe

        return describe(self._path_of, self._limits.overload_status, admin_api=self._limits.admin_api)

    async def health(self, request: Request) -> Sent:
        """GET /health: 200 also without workers, so that the frontend may start first; 503 before it knows
        which models there are, and once it is leaving."""
        body: dict[str, Any] = {"status": "healthy"}
        able = self._models.looked and not self.draining
        if not able:
            body = {"status": "not_ready", "stage": "draining" if self.draining else "starting"}
        instances = {
            (instance.namespace, instance.component, instance.endpoint, instance.instance_id): instance
            for worker_set in self._models.sets()
            for instance in worker_set.instances()
        }
        body["endpoints"] = sorted({f"dyn://{ns}.{component}.{name}" for ns, component, name, _ in instances})
        body["instances"] = [instances[key] for key in sorted(instances)]
        return answer(request, 200 if able else 503, msgspec.json.encode(body))

    async def live(self, request: Request) -> Sent:
        """GET /live: 200 as long as the process answers."""
        return answer(request, 200, b'{"status":"live","message":"Service is live"}')

    async def metrics(self, request: Request) -> Sent:
        """GET /metrics: what all processes of this port have counted."""
        text = self._metrics.render() if self.siblings is None else await self.siblings.metrics()
        return answer(request, 200, text, CONTENT_TYPE)

    async def openapi(self, request: Request) -> Sent:
        """GET /openapi.json."""
        return answer(request, 200, self._description.document)

    async def docs(self, request: Request) -> Sent:
        """GET /docs: the same for people."""
        return answer(request, 200, self._description.page, "text/html; charset=utf-8")
