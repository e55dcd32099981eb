"""Which worker is the right one? Each policy is one file; this registry is all that names them.

A policy gives every worker a cost and the lowest wins. To add one: write a file, add one line to `POLICIES`.
"""

from collections.abc import Callable
from typing import Protocol

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.linear import LinearCost
from dynamo.router.policies.lmetric import LMetric
from dynamo.router.policies.sticky import StickyUntilSaturated
from dynamo.router.types import View, WorkerKey


class Policy(Protocol):
    """What a choice is made by."""

    name: str

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, by position."""
        ...

    def terms(self, view: View, position: int) -> dict[str, float]:
        """What the cost of one worker is made of, for people who ask why."""
        ...

    def observe(self, worker: WorkerKey, new_tokens: int, ttft_s: float, prefill_tokens_before: int) -> None:
        """A request made its first token `ttft_s` after it was sent, behind `prefill_tokens_before` others' tokens."""
        ...


POLICIES: dict[str, Callable[[KvRouterConfig], Policy]] = {
    "linear": LinearCost,
    "lmetric": LMetric,
    "sticky": StickyUntilSaturated,
}


def make_policy(name: str, config: KvRouterConfig) -> Policy:
    """The policy of that name. Raises ValueError naming those there are."""
    make = POLICIES.get(name)
    if make is None:
        raise ValueError(f"router_policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return make(config)
