"""Which prompts of one model do its prefill workers compute, and which its decode workers? [G13]

Both pools' routers are asked first whether they would take the prompt at all: a pool that is overloaded, or has nobody,
leaves it to the other. If both would, the policy decides. Nothing is booked here, and nothing is sent.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from dynamo.router.config import KvRouterConfig
from dynamo.router.journey import Journey
from dynamo.router.model_router import ModelRouter
from dynamo.router.policies.predicted import MIN_TOKEN_S
from dynamo.router.split import Always, Split, split_policy
from dynamo.router.split_choice import SplitChoice, prompt_time
from dynamo.router.split_settings import SplitSettings, split_warnings
from dynamo.router.types import RouteRequest
from dynamo.runtime.errors import DynamoException, WorkerUnavailable

log = logging.getLogger(__name__)

_ASKED = Split(True, "asked", "the request names its prefill worker")
_EVERY = Split(True, "always", "every prompt is computed by a prefill worker")


class ModelSplit:
    """Decides for the prompts that come to `decode`'s workers, which `prefill`'s could compute.

    `transfer_s` says how long the KV of so many tokens travels, between workers with so many places in common if given.
    """

    def __init__(
        self, prefill: ModelRouter, decode: ModelRouter, config: KvRouterConfig, transfer_s: Callable[..., float]
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.config = config
        """The settings in effect; see `configure`."""
        self._transfer_s = transfer_s
        self._choice = SplitChoice(split_policy(config), prefill.queue, decode.queue, transfer_s)
        self._now = asyncio.get_running_loop().time

    @property
    def policy(self) -> str:
        """The name of the policy in effect."""
        return self._choice.policy.name

    def configure(self, config: KvRouterConfig) -> None:
        """From the next prompt on these settings hold."""
        self.config = config
        self._choice.policy = split_policy(config)

    def decide(self, at_decode: RouteRequest, at_prefill: RouteRequest) -> Split:
        """Where a prompt is to be computed: what either pool's router would be asked for it. If neither takes it, the
        answer is the decode workers, whose router says why."""
        here, there = self.decode.as_routed(at_decode), self.prefill.as_routed(at_prefill)
        split = self._shed(here, there)
        if split is None and at_prefill.allowed is not None:
            split = _ASKED
        if split is None:  # both can, as was just seen
            every = self._choice.policy.name == Always.name
            split = _EVERY if every else self._choice.decide(here, self._now(), there)
        if log.isEnabledFor(logging.DEBUG):
            where = "a prefill worker" if split.remote else "the decode worker"
            log.debug(
                "prompt %s of %s is computed by %s: %s (%s, %s)",
                at_decode.request_id, self.decode.name, where, split.reason, self.policy, dict(split.terms),
            )  # fmt: skip
        return split

    def journey(self, places: frozenset[str]) -> Journey:
        """What the decode workers' router must know of the way from a prefill worker that is in these places."""
        _, token_s = prompt_time(self.prefill.scheduler, self.decode.scheduler)
        return Journey(places, self._transfer_s, max(token_s, MIN_TOKEN_S))

    def explain(self, split: Split) -> dict[str, Any]:
        """A decision for people: all that it says, and whose it is."""
        return {"policy": self.policy, **msgspec.structs.asdict(split)}

    def _shed(self, here: RouteRequest, there: RouteRequest) -> Split | None:
        """Who computes the prompt if a pool cannot; None if both can."""
        not_there = self.prefill.refusal(there)
        not_here = self.decode.refusal(here)
        if not_there is None and not_here is None:
            return None
        if not_here is None:
            return Split(False, _cause("prefill", not_there), f"no prefill worker takes it: {not_there}")
        if not_there is None and not isinstance(not_here, WorkerUnavailable):
            return Split(True, _cause("decode", not_here), f"no decode worker takes it: {not_here}")
        if not_there is None:  # somebody has to answer, too
            return Split(False, _cause("decode", not_here), f"no decode worker takes it: {not_here}")
        return Split(False, "neither", f"nobody takes it: {not_there}; {not_here}")

    def facts(self) -> dict[str, Any]:
        """What an operator may ask."""
        return {"policy": self.policy, **SplitSettings.of(self.config)}

    def warnings(self) -> list[str]:
        """What of the settings works otherwise than it may be meant, in sentences."""
        found = split_warnings(self.config)
        if self.config.conditional_disagg_enabled and self.config.conditional_disagg_decode_busy_threshold is not None:
            load = self.decode.scheduler.load
            unsized = sum(limits.total_blocks is None for limits in load.limits)
            if unsized:
                found.append(f"decode_busy_threshold does not apply to {unsized} workers without total_kv_blocks")
        return found


def _cause(pool: str, error: DynamoException | None) -> str:
    return f"{pool}_unavailable" if isinstance(error, WorkerUnavailable) else f"{pool}_overloaded"
