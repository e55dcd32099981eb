"""Which workers must, and which should, a request go to? [K47]"""

import math
from collections.abc import Iterable, Mapping


class RoutingConstraints:
    """`required_taints`: the worker must have all of them. `preferred_taints`: by taint, how much better it is to have
    it; the sum over those a worker has goes through tanh and makes it that much cheaper. Below zero: to be avoided.

    Raises ValueError for a weight that is no finite number.
    """

    def __init__(
        self, required_taints: Iterable[str] | None = None, preferred_taints: Mapping[str, float] | None = None
    ) -> None:
        self.required_taints = frozenset(required_taints or ())
        self.preferred_taints = dict(preferred_taints or {})
        for taint, weight in self.preferred_taints.items():
            if not math.isfinite(weight):
                raise ValueError(f"preferred_taints[{taint!r}] must be a finite number, got {weight!r}")

    def __repr__(self) -> str:
        return f"RoutingConstraints({sorted(self.required_taints)}, {self.preferred_taints})"
