"""Can this process do its work?

`Health` keeps one word for each served endpoint and one for the whole. A `Canary` earns an endpoint its word: when
the endpoint has answered nobody for a while, it sends it a small request the way a caller would, and an answer
that does not come makes the endpoint `notready`, and leaves it out of routing, until one does, to the canary or to
anybody else whose request is still there.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from dynamo import prometheus_names as names
from dynamo.runtime.context import Context
from dynamo.runtime.errors import DiscoveryError, DynamoException, EngineShutdown, WorkerOverloaded
from dynamo.runtime.metrics import EndpointMetrics, Metrics
from dynamo.runtime.options import env_bool, env_number

logger = logging.getLogger(__name__)

Status = Literal["ready", "notready"]

HEALTH_CHECK_KEY: Final = "_HEALTH_CHECK"  # set to true in a canary's payload, so that a handler can tell


class Uptime(msgspec.Struct, frozen=True):
    """A duration in whole seconds and the nanoseconds beyond them."""

    secs: int
    nanos: int


class HealthReport(msgspec.Struct, frozen=True):
    """The body of `GET /health`."""

    status: Status
    uptime: Uptime
    endpoints: dict[str, Status]

    @property
    def ready(self) -> bool:
        """Whether requests may be sent here."""
        return self.status == "ready"


class Health:
    """The state of one runtime.

    It is ready when every endpoint is and it serves at least one. `set_ready(True)` declares a process without
    endpoints ready; `set_ready(False)` makes it notready whatever its endpoints say. Until either is known,
    `DYN_SYSTEM_STARTING_HEALTH_STATUS` counts. Raises ValueError for a wrong value of that variable.
    """

    def __init__(self) -> None:
        self._started_ns = time.monotonic_ns()
        self._starting = _starting_status(os.environ)
        self._declared: bool | None = None
        self._endpoints: dict[str, dict[int, bool]] = {}

    def set_ready(self, ready: bool) -> None:
        """What the program says of itself (`runtime.set_health_status`)."""
        self._declared = ready

    def set_endpoint(self, name: str, ready: bool, instance_id: int = 0) -> None:
        """What is known of one instance of an endpoint; the endpoint is ready when all its instances are."""
        self._endpoints.setdefault(name, {})[instance_id] = ready

    def remove_endpoint(self, name: str, instance_id: int = 0) -> None:
        """The instance is no longer served here."""
        instances = self._endpoints.get(name, {})
        instances.pop(instance_id, None)
        if not instances:
            self._endpoints.pop(name, None)

    def endpoint_ready(self, name: str) -> bool:
        """Whether all instances of the endpoint are ready; False if there is none."""
        instances = self._endpoints.get(name, {})
        return bool(instances) and all(instances.values())

    @property
    def ready(self) -> bool:
        """Whether requests may be sent here."""
        if self._declared is False or not all(map(self.endpoint_ready, self._endpoints)):
            return False
        return bool(self._endpoints) or (self._starting if self._declared is None else self._declared)

    def snapshot(self) -> HealthReport:
        """The state now."""
        secs, nanos = divmod(time.monotonic_ns() - self._started_ns, 1_000_000_000)
        endpoints = {name: _word(self.endpoint_ready(name)) for name in sorted(self._endpoints)}
        return HealthReport(_word(self.ready), Uptime(secs, nanos), endpoints)


def _word(ready: bool) -> Status:
    return "ready" if ready else "notready"


def _starting_status(environ: Mapping[str, str]) -> bool:
    word = environ.get("DYN_SYSTEM_STARTING_HEALTH_STATUS", "notready").strip().lower()
    if word not in ("ready", "notready"):
        raise ValueError(f"DYN_SYSTEM_STARTING_HEALTH_STATUS: {word!r} is not one of ready, notready")
    return word == "ready"


# --- the canary


class CanaryOptions(NamedTuple):
    """When a canary asks, and how long it waits for the answer."""

    enabled: bool
    wait_s: float
    timeout_s: float


def canary_options() -> CanaryOptions:
    """`DYN_HEALTH_CHECK_ENABLED`, `DYN_CANARY_WAIT_TIME`, `DYN_HEALTH_CHECK_REQUEST_TIMEOUT` (seconds).

    Raises ValueError that names the variable.
    """
    wait_s = _positive("DYN_CANARY_WAIT_TIME", 10.0)  # the pause users of Dynamo know
    timeout_s = _positive("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", 3.0)  # as above
    return CanaryOptions(env_bool("DYN_HEALTH_CHECK_ENABLED", False), wait_s, timeout_s)


def _positive(variable: str, default: float) -> float:
    value = env_number(variable, default)
    if not 0 < value < float("inf"):
        raise ValueError(f"{variable}: {value} must be a number of seconds above 0")
    return value


def load_health_check_from_env(env_var: str = "DYN_HEALTH_CHECK_PAYLOAD") -> dict[str, Any] | None:
    """The payload in the variable: a JSON object, or `@` and the path of a file with one. None if it is unset.

    Raises ValueError that names the variable.
    """
    text = os.environ.get(env_var, "").strip()
    if not text:
        return None
    try:
        payload = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except OSError as e:
        raise ValueError(f"{env_var}: cannot read {text[1:]!r}: {e.strerror}") from None
    except ValueError as e:
        raise ValueError(f"{env_var}: not valid JSON: {e}") from None
    if not isinstance(payload, dict):
        raise ValueError(f"{env_var}: the payload must be a JSON object, not {type(payload).__name__}")  # noqa: TRY004
    return payload


Probe = Callable[[dict[str, Any]], Awaitable[None]]
"""Sends a payload to the endpoint and waits for the end of its answer. Raises if there is none."""


Say = Callable[[bool], Awaitable[None]]
"""Takes whether the endpoint is well. Raises DiscoveryError if that could not be acted upon; it is said again."""


class Canary:
    """Watches one instance of an endpoint. `answers()` must change with every answer the endpoint gives."""

    def __init__(
        self,
        say: Say,
        name: str,
        probe: Probe,
        payload: Mapping[str, Any],
        options: CanaryOptions,
        answers: Callable[[], float],
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._say_to = say
        self._name = name
        self._probe = probe
        self._payload = {**payload, HEALTH_CHECK_KEY: True}
        self._options = options
        self._answers = answers
        self._failing = False
        self._count = metrics and metrics.counter(
            names.health.CANARY_TOTAL,
            "Canary requests, by outcome",
            [names.labels.ENDPOINT, names.health.OUTCOME_LABEL],
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch, on the running loop; once, however often it is said."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"canary {self._name}")

    async def stop(self) -> None:
        """Stop watching; what was last said of the endpoint stays."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        seen, quiet_since = self._answers(), loop.time()
        while True:
            await asyncio.sleep(self._options.wait_s / 4)  # so the endpoint is asked within 1.25 times the wait
            if self._answers() != seen:
                seen, quiet_since = self._answers(), loop.time()
                await self._say(True, "it answered a request")
            elif loop.time() - quiet_since >= self._options.wait_s or self._failing:
                await self._ask()
                seen, quiet_since = self._answers(), loop.time()

    async def _ask(self) -> None:
        failed = True
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._probe(self._payload)
        except TimeoutError:
            await self._say(False, f"no answer within {self._options.timeout_s:g} s")
        except (WorkerOverloaded, EngineShutdown) as e:
            # It has too much to do, or ends: it says so, and is no worse for it.
            logger.debug("endpoint %s refused the canary: %s", self._name, e)
        except Exception as e:  # noqa: BLE001 - any other failure of the request is the finding
            await self._say(False, f"{type(e).__name__}: {e}")
        else:
            failed = False
            await self._say(True, "it answered the canary")
        if self._count:
            self._count.labels(self._name, "failure" if failed else "success").inc()

    async def _say(self, is_well: bool, why: str) -> None:
        if is_well == self._failing:
            logger.log(
                logging.INFO if is_well else logging.WARNING, "endpoint %s is %s: %s", self._name, _word(is_well), why
            )
        self._failing = not is_well
        try:
            await self._say_to(is_well)
        except DiscoveryError as e:
            logger.warning("endpoint %s: %s; it is said again", self._name, e)


class _Client(Protocol):
    def direct(
        self, request: Any, instance_id: int, annotated: bool = ..., context: Context | None = ...
    ) -> Awaitable[AsyncIterator[Any]]: ...


def request_probe(client: _Client, instance_id: int) -> Probe:
    """A probe that goes the way of every request: through the request plane, to this instance."""

    async def probe(payload: dict[str, Any]) -> None:
        context = Context()
        try:
            async for _ in await client.direct(payload, instance_id, annotated=False, context=context):
                pass
        finally:
            context.kill()  # after a timeout the worker must not go on; after the end this does nothing

    return probe


async def until_answered(probe: Probe, payload: Mapping[str, Any], every_s: float, timeout_s: float) -> None:
    """Ask until there is an answer, whatever kind of error there is before."""
    while True:
        await asyncio.sleep(every_s)
        try:
            async with asyncio.timeout(timeout_s):
                await probe({**payload, HEALTH_CHECK_KEY: True})
        except (TimeoutError, DynamoException) as e:
            logger.debug("still no answer: %s", e or "none in time")
        else:
            return


def canary_for(
    say: Say,
    metrics: Metrics,
    counters: EndpointMetrics,
    name: str,
    client: _Client,
    instance_id: int,
    payload: Mapping[str, Any] | None,
) -> Canary | None:
    """The canary of a served endpoint, not started; None if canaries are off or there is nothing to send.

    `DYN_HEALTH_CHECK_PAYLOAD` wins over `payload`, as an operator wins over a program.
    """
    options = canary_options()
    if not options.enabled:
        return None
    payload = load_health_check_from_env() or payload
    if not payload:
        logger.warning("DYN_HEALTH_CHECK_ENABLED: endpoint %s has no payload, so it is not checked", name)
        return None
    return Canary(
        say,
        name,
        request_probe(client, instance_id),
        payload,
        options,
        lambda: counters.response_bytes.value,
        metrics=metrics,
    )
