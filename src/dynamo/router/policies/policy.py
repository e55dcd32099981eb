"""What must a policy be able to do?"""

from typing import ClassVar, Protocol

from dynamo.router.types import Decoded, Prefilled, View, WorkerKey


class Policy(Protocol):
    """What a choice is made by: every worker has a cost, the lowest wins."""

    name: ClassVar[str]
    learns: ClassVar[bool]
    """Whether it wants to hear how requests fared; keeping account for it takes a microsecond a request."""

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, by position."""
        ...

    def waiting(self, view: View, position: int, tokens: float) -> float:
        """How much more this worker costs if the request waits there as long as computing so many tokens takes, without
        anybody else waiting."""
        ...

    def terms(self, view: View, position: int) -> dict[str, float]:
        """What the cost of one worker is made of, for people who ask why."""
        ...

    def prefilled(self, result: Prefilled) -> None:
        """A request made its first token."""
        ...

    def decoded(self, result: Decoded) -> None:
        """A request ended in order."""
        ...

    def forget(self, worker: WorkerKey) -> None:
        """A worker is gone."""
        ...


class FixedPolicy:
    """The part of a policy that learns nothing, and whose costs are tokens to compute."""

    learns: ClassVar[bool] = False

    def waiting(self, view: View, position: int, tokens: float) -> float:
        """See `Policy`."""
        return tokens

    def prefilled(self, result: Prefilled) -> None:
        """Nothing is learnt."""

    def decoded(self, result: Decoded) -> None:
        """Nothing is learnt."""

    def forget(self, worker: WorkerKey) -> None:
        """Nothing is known."""
