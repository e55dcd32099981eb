"""Which worker is the right one? Each policy is one file; this registry is all that names them.

To add one: write a file with a class that is a `Policy`, add one line to `POLICIES`.
"""

from collections.abc import Callable

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.linear import LinearCost
from dynamo.router.policies.lmetric import LMetric
from dynamo.router.policies.marginal import MarginalCost
from dynamo.router.policies.policy import Policy
from dynamo.router.policies.predicted import PredictedLatency
from dynamo.router.policies.sticky import StickyUntilSaturated

__all__ = ["POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, Callable[[KvRouterConfig], Policy]] = {
    "linear": LinearCost,
    "lmetric": LMetric,
    "marginal": MarginalCost,
    "predicted": PredictedLatency,
    "sticky": StickyUntilSaturated,
}


def make_policy(name: str, config: KvRouterConfig) -> Policy:
    """The policy of that name. Raises ValueError naming those there are."""
    make = POLICIES.get(name)
    if make is None:
        raise ValueError(f"router_policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return make(config)
