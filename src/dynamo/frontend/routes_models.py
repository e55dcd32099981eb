"""Which models are there, and is one ready?"""

import msgspec

from dynamo.frontend.http1 import Request, Sent
from dynamo.frontend.models import ModelRegistry
from dynamo.frontend.server import answer

_READY = "/ready"


class ModelRoutes:
    """The handlers of `/v1/models` and what is below it [A3-A5]."""

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models

    async def list_models(self, request: Request) -> Sent:
        """GET /v1/models: those that can answer now."""
        data = [model.describe() for model in self._models.ready()]
        return answer(request, 200, msgspec.json.encode({"object": "list", "data": data}))

    async def one(self, request: Request, name: str) -> Sent:
        """GET /v1/models/{id}, or /v1/models/{id}/ready where no model has that whole name.

        Raises:
            RequestRefused: 404, no worker serves the model.
            WorkerUnavailable: it is not known yet which models there are.
        """
        model = self._models.get(name)
        if model is not None and model.ready:
            return answer(request, 200, msgspec.json.encode(model.describe()))
        if model is None and name.endswith(_READY):
            known = self._models.get(name.removesuffix(_READY))
            if known is not None:
                return answer(request, 200, msgspec.json.encode(known.readiness()))
        raise self._models.unknown(name.removesuffix(_READY))
