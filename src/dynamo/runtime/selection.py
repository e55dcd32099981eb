"""Which of the live instances gets the next request, when nothing is known of its content?

A choice is a function from candidates to one candidate. Loads are the requests that this process has in
flight at each instance.
"""

import enum
import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import env_number

DEFAULT_CUDA_TO_CPU_RATIO = 8.0  # DYN_ENCODER_CUDA_TO_CPU_RATIO: an accelerator takes 8 times a CPU's share


class RouterMode(enum.Enum):
    """How a client chooses an instance. `KV` is the business of `dynamo.router`, `Direct` of the caller."""

    RoundRobin = "round-robin"
    Random = "random"
    PowerOfTwoChoices = "power-of-two"
    KV = "kv"
    Direct = "direct"
    LeastLoaded = "least-loaded"
    DeviceAwareWeighted = "device-aware-weighted"


class Candidate(Protocol):
    """What a choice may look at. `inflight`: requests this process has there; `device_type`: `cuda` or `cpu`."""

    inflight: int

    @property
    def device_type(self) -> str: ...


C = TypeVar("C", bound=Candidate)


class Chooser:
    """One client's choices. Owns the round-robin position; the other modes keep nothing."""

    def __init__(self) -> None:
        self._turn = random.randrange(1 << 16)  # callers that start together do not all begin at the same instance
        self._cuda_weight = env_number("DYN_ENCODER_CUDA_TO_CPU_RATIO", DEFAULT_CUDA_TO_CPU_RATIO)
        if self._cuda_weight <= 0:
            raise ValueError(f"DYN_ENCODER_CUDA_TO_CPU_RATIO: {self._cuda_weight} is not above 0")

    def choose(self, mode: RouterMode, candidates: Sequence[C]) -> C:
        """One of `candidates`, which must not be empty. Raises InvalidArgument for KV and Direct."""
        if mode is RouterMode.RoundRobin:
            return self.round_robin(candidates)
        if mode is RouterMode.Random:
            return random.choice(candidates)
        if mode is RouterMode.PowerOfTwoChoices:
            return power_of_two(candidates)
        if mode is RouterMode.LeastLoaded:
            return self.least_loaded(candidates)
        if mode is RouterMode.DeviceAwareWeighted:
            return self.device_aware(candidates)
        raise InvalidArgument(
            f"router mode {mode.value} does not choose by itself: name the instance (client.direct), "
            "or use the KV router of dynamo.router",
            "router_mode",
        )

    def round_robin(self, candidates: Sequence[C]) -> C:
        """The next in turn."""
        self._turn += 1
        return candidates[self._turn % len(candidates)]

    def least_loaded(self, candidates: Sequence[C]) -> C:
        """The one with the fewest requests in flight; among equals the next in turn."""
        self._turn += 1
        start = self._turn % len(candidates)
        best = candidates[start]
        for i in range(1 - len(candidates), 0):  # start + 1 … start - 1, by negative indexes
            other = candidates[start + i]
            if other.inflight < best.inflight:
                best = other
        return best

    def device_aware(self, candidates: Sequence[C]) -> C:
        """Least loaded within the device type whose load, inflight / (count x weight), is lowest.

        The weight of `cuda` is DYN_ENCODER_CUDA_TO_CPU_RATIO, that of everything else 1.
        """
        groups: dict[str, list[C]] = {}
        for candidate in candidates:
            groups.setdefault(candidate.device_type, []).append(candidate)

        def load(device_type: str) -> tuple[float, float]:
            group = groups[device_type]
            weight = self._cuda_weight if device_type == "cuda" else 1.0
            return sum(c.inflight for c in group) / (len(group) * weight), -weight

        return self.least_loaded(groups[min(groups, key=load)])


def power_of_two(candidates: Sequence[C]) -> C:
    """Two at random, the less loaded of them."""
    if len(candidates) < 2:
        return candidates[0]
    one, two = random.sample(candidates, 2)
    return two if two.inflight < one.inflight else one
