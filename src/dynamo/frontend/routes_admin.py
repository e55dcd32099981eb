"""What is in effect, when does a worker count as busy (facts row A18), and which prompts go to prefill workers?"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from dynamo.frontend.bodies import BusyThreshold, BusyThresholds, ConditionalDisagg, ConditionalDisaggs, Status
from dynamo.frontend.http1 import Request, Sent
from dynamo.frontend.models import ModelRegistry
from dynamo.frontend.server import answer
from dynamo.router.config import LoadThresholdConfig
from dynamo.router.split_settings import PREFIX, SplitSettings, changed
from dynamo.runtime.errors import UNDECODABLE, InvalidArgument

log = logging.getLogger(__name__)

_NAMES = LoadThresholdConfig.__struct_fields__
Body = TypeVar("Body", bound=msgspec.Struct)


class AdminRoutes:
    """The handlers of `/busy_threshold`, `/conditional_disagg` and `/status`."""

    def __init__(self, models: ModelRegistry, router_mode: str, warnings: list[str]) -> None:
        self._models = models
        self._router_mode = router_mode
        self._warnings = warnings
        self.on_change: Callable[[], Awaitable[None]] | None = None
        """Called when something was set, before that is answered."""

    async def busy_threshold(self, request: Request) -> Sent:
        """GET: the thresholds of all models. POST: change a model's; what is left out or null stays as it is.

        Raises:
            RequestRefused: 404, nobody serves the model.
            InvalidArgument: a value that cannot be meant, or a model whose router has no thresholds.
        """
        if request.method != "POST":
            every = BusyThresholds([self._of(model.name) for model in self._models.all()])
            return answer(request, 200, msgspec.json.encode(every))
        asked = _decoded(request, BusyThreshold)
        changes = {name: value for name in _NAMES if (value := getattr(asked, name)) is not None}
        if self._models.get(asked.model) is None:
            raise self._models.unknown(asked.model)
        if changes:
            self._change(asked.model, changes)
            await self._changed()
        return answer(request, 200, msgspec.json.encode(self._of(asked.model)))

    def _change(self, name: str, changes: dict[str, Any]) -> None:
        if self._router_mode != "kv":
            raise InvalidArgument(
                f"busy thresholds need --router-mode kv; this server routes by {self._router_mode}", min(changes)
            )
        try:
            thresholds = LoadThresholdConfig(**{**self._models.thresholds(name), **changes})
        except ValueError as e:
            raise InvalidArgument(f"Validation: {e}", str(e).partition(" ")[0]) from None
        self._models.set_thresholds(name, thresholds)

    async def _changed(self) -> None:
        if self.on_change is not None:
            await self.on_change()

    def _of(self, name: str) -> BusyThreshold:
        return BusyThreshold(name, **self._models.thresholds(name))

    async def conditional_disagg(self, request: Request) -> Sent:
        """GET: which prompts go to prefill workers, of all models. POST: change a model's; what is left out stays, and
        null switches a busy threshold off.

        Raises:
            RequestRefused: 404, nobody serves the model.
            InvalidArgument: a value that cannot be meant, or a model whose router does not know what a choice needs.
        """
        if request.method != "POST":
            every = ConditionalDisaggs([self._split_of(model.name) for model in self._models.all()])
            return answer(request, 200, msgspec.json.encode(every))
        asked = _decoded(request, ConditionalDisagg)
        if self._models.get(asked.model) is None:
            raise self._models.unknown(asked.model)
        if changes := asked.changes():
            self._change_split(asked.model, changes)
            await self._changed()
        return answer(request, 200, msgspec.json.encode(self._split_of(asked.model)))

    def _change_split(self, name: str, changes: dict[str, Any]) -> None:
        if self._router_mode != "kv":
            raise InvalidArgument(
                f"conditional disaggregation needs --router-mode kv; this server routes by {self._router_mode}",
                min(changes).removeprefix(PREFIX),
            )
        try:
            config = changed(self._models.split(name), changes)
        except ValueError as e:
            raise InvalidArgument(f"Validation: {e}", str(e).partition(" ")[0].rstrip(":")) from None
        self._models.set_split(name, config)

    def _split_of(self, name: str) -> ConditionalDisagg:
        config = self._models.split(name)
        return ConditionalDisagg(model=name, enabled=config.conditional_disagg_enabled, **SplitSettings.of(config))

    async def status(self, request: Request) -> Sent:
        """GET /status: of every model, its workers and how its requests are routed; and what is amiss."""
        warnings = list(self._warnings)
        models: dict[str, list[dict[str, Any]]] = {}
        for model in self._models.all():
            for worker_set in model.sets.values():
                router = worker_set.router.status() if worker_set.router is not None else None
                entry = {
                    "endpoint": worker_set.key.path,
                    "ready": worker_set.ready,
                    "workers": worker_set.worker_count,
                    "router": router,
                    "split": worker_set.split_status(),
                }
                models.setdefault(model.name, []).append(entry)
                if worker_set.trouble:
                    warnings.append(f"{model.name}: {worker_set.trouble}")
                if worker_set.split is not None:
                    warnings += [f"{model.name}: {line}" for line in worker_set.split.warnings()]
                if router is not None:
                    warnings += [f"{model.name}: {line}" for line in router["warnings"]]
        return answer(request, 200, msgspec.json.encode(Status(self._router_mode, warnings, models)))


def _decoded(request: Request, kind: type[Body]) -> Body:
    """The body of a request. Raises InvalidArgument."""
    try:
        return msgspec.json.decode(request.body, type=kind)
    except UNDECODABLE as e:
        where = str(e).rpartition("$.")[2].strip("`") if "$." in str(e) else None
        raise InvalidArgument(f"Validation: {e}", where) from None
