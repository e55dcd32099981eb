"""What must a prompt's stream know of the workers that it can go to? A `WorkerSet` is both of these."""

from typing import Any, Protocol

from dynamo.llm.kv_lease import Keeping
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.llm.topology import Near
from dynamo.router.model_router import ModelRouter
from dynamo.router.model_split import ModelSplit
from dynamo.runtime.context import Context
from dynamo.runtime.streams import StreamSink


class PrefillPool(Protocol):
    """The prefill workers of one model."""

    router: ModelRouter | None

    def choose(self, request: PreprocessedRequest) -> int:
        """See `Workers`."""

    def start_request(self, instance_id: int, request: object, sink: StreamSink, context: Context) -> object:
        """Send it; errors go to the sink."""

    def near(self, instance_id: int) -> Near | None:
        """Where the KV of this worker may, or should, go."""

    def places(self, instance_id: int) -> frozenset[str]:
        """Where this worker is, as taints."""

    def meeting(self, instance_id: int, dp_rank: int | None) -> dict[str, Any] | None:
        """A new `bootstrap_info`, if this worker meets decode workers while it computes; None if it writes handles."""

    def keep(self, handle: dict[str, Any]) -> Keeping | None:
        """Let the KV not expire before a decode worker has the request."""

    def give_back(self, handle: dict[str, Any]) -> None:
        """Tell the worker that nobody will fetch the KV."""


class Workers(Protocol):
    """Where a prompt can go: the workers of one model."""

    router: ModelRouter | None
    """Who says where, in its own time; None: `choose` does, at once."""
    split: ModelSplit | None
    """Who says which prompts the prefill workers get; None: all."""

    @property
    def prefill(self) -> PrefillPool | None:
        """Who computes prompts for these workers; None while they do it themselves."""

    def choose(self, request: PreprocessedRequest, near: Near | None = None) -> int:
        """The instance for this request. Raises WorkerUnavailable, or InvalidArgument for a pin that cannot be."""

    def pairs(self, near: Near) -> bool:
        """Whether one of them may have KV that must stay in a place."""

    def start_request(self, instance_id: int, request: object, sink: StreamSink, context: Context) -> object:
        """Send it; errors go to the sink."""

    def see_transfer(self, engine_data: dict[str, Any], instance_id: int, places: frozenset[str]) -> None:
        """Learn how long KV takes from what a worker said with an output, whose KV may have come from these places."""

    def avoid(self, instance_id: int) -> None:
        """Leave an instance out of choices for a while: it has lost a request."""
