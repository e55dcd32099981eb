"""What does a caller say of a request that wants a worker, and what does the router make of it?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router.constraints import RoutingConstraints
from dynamo.router.route_request import hash_prompt
from dynamo.router.types import RouteRequest, RouterOverride, WorkerKey
from dynamo.runtime.errors import InvalidArgument
from dynamo.services.bodies import unsigned
from dynamo.services.cache_group import GroupKey

MAX_ID_CHARS = 512
MAX_CANDIDATES = 4096  # workers that one request names


class PromptBody(msgspec.Struct, kw_only=True):
    """A prompt, as tokens or, for callers that hash themselves, as the local hashes of its full blocks.

    Adapter, salt and multimodal content are part of those hashes; with `token_ids` they are mixed in here.
    """

    model_name: str = "default"
    routing_group: str = "default"
    token_ids: list[int] | None = None
    block_hashes: list[int] | None = None
    sequence_hashes: list[int] | None = None
    isl_tokens: int | None = None
    lora_name: str | None = None
    block_mm_infos: list[dict[str, Any] | None] | None = None
    cache_salt: str | None = None
    cache_namespace: str | None = None
    is_eagle: bool | None = None
    router_config_override: dict[str, Any] | None = None

    @property
    def key(self) -> GroupKey:
        """Whose workers are asked for."""
        return GroupKey(self.model_name, self.routing_group)


class Constraints(msgspec.Struct):
    """See `dynamo.router.constraints`."""

    required_taints: list[str] = []
    preferred_taints: dict[str, float] = {}


class SelectBody(PromptBody, kw_only=True):
    """`POST /select` and `/select_and_reserve`."""

    selection_id: str | None = None
    routing_constraints: Constraints | None = None
    priority_jump: float = 0.0
    strict_priority: int = 0
    policy_class: str | None = None
    expected_output_tokens: int | None = None
    session_id: str | None = None
    session_final: bool = False
    allowed_worker_ids: list[int] | None = None
    pinned_worker: WorkerKey | dict[str, int] | None = None
    explain: bool = False
    """Answer with all candidates and what spoke for each."""


class ReservationBody(PromptBody, kw_only=True):
    """`POST /reservations`: book what `/select` chose, or, with a `worker_id`, what the caller chose itself."""

    selection_id: str
    worker_id: int | None = None
    dp_rank: int = 0
    track_prefill_tokens: bool = True
    effective_prefill_tokens: int | None = None
    expected_output_tokens: int | None = None


class OutputBlockBody(msgspec.Struct):
    """`POST /reservations/{id}/output_block`: `decay_fraction` of the request's own blocks still counts, 0 to 1."""

    decay_fraction: float | None = None


class FreeBody(msgspec.Struct):
    """`DELETE /reservations/{id}`: `output_tokens` of a request that ended in order; policies learn from it."""

    output_tokens: int | None = None


def check_id(value: str) -> str:
    """Raises InvalidArgument for an id that is too long or empty."""
    if not 0 < len(value) <= MAX_ID_CHARS:
        raise InvalidArgument(f"selection_id: must have 1 to {MAX_ID_CHARS} characters", "selection_id")
    return value


def prompt_request(request_id: str, body: PromptBody, block_size: int, *, is_eagle: bool = False) -> RouteRequest:
    """What the router looks at of a prompt. Raises InvalidArgument naming the field."""
    if body.token_ids is not None:
        try:
            hashes = hash_prompt(
                body.token_ids,
                block_size,
                block_mm_infos=body.block_mm_infos,
                lora_name=body.lora_name,
                is_eagle=body.is_eagle if body.is_eagle is not None else is_eagle,
                cache_namespace=body.cache_namespace or body.cache_salt,
            )
        except InvalidArgument as e:
            field = "token_ids" if e.param == "tokens" else e.param
            raise InvalidArgument(f"{field}: {e.message}", field) from None
        tokens = len(body.token_ids)
    else:
        hashes, tokens = _given_hashes(body, block_size)
    override = body.router_config_override
    return RouteRequest(
        request_id=request_id,
        token_count=tokens,
        sequence_hashes=hashes,
        override=RouterOverride.parse(override) if override else None,
    )


def _given_hashes(body: PromptBody, block_size: int) -> tuple[list[int], int]:
    if body.block_hashes is None:
        raise InvalidArgument(
            "token_ids: is missing; or give block_hashes, the local hashes of its blocks", "token_ids"
        )
    hashes = sequence_hashes(unsigned("block_hashes", body.block_hashes))
    if body.sequence_hashes is not None and unsigned("sequence_hashes", body.sequence_hashes) != hashes:
        raise InvalidArgument(
            f"sequence_hashes: are not the chain of the {len(hashes)} block_hashes; leave them out, they follow from "
            "those (keyed tracking hashes are not in this version)",
            "sequence_hashes",
        )
    least = len(hashes) * block_size
    tokens = least if body.isl_tokens is None else body.isl_tokens
    if tokens < least:
        raise InvalidArgument(
            f"isl_tokens: {tokens} is less than {len(hashes)} blocks of {block_size} tokens", "isl_tokens"
        )
    return hashes, tokens


def constrain(request: RouteRequest, body: SelectBody, workers: Mapping[int, Sequence[WorkerKey]]) -> None:
    """Add to a request all that a caller may ask for beside the prompt. Raises InvalidArgument naming the field."""
    for field in ("priority_jump",):
        if not math.isfinite(getattr(body, field)):
            raise InvalidArgument(f"{field}: must be a finite number", field)
    if body.expected_output_tokens is not None and body.expected_output_tokens < 0:
        raise InvalidArgument("expected_output_tokens: is negative", "expected_output_tokens")
    request.priority_jump, request.strict_priority = body.priority_jump, body.strict_priority
    request.policy_class = body.policy_class
    request.expected_output_tokens = body.expected_output_tokens
    request.session_id, request.session_final = body.session_id or None, body.session_final
    if body.routing_constraints is not None:
        try:
            wanted = RoutingConstraints(
                body.routing_constraints.required_taints, body.routing_constraints.preferred_taints
            )
        except ValueError as e:
            raise InvalidArgument(f"routing_constraints.{e}", "routing_constraints") from None
        request.required_taints, request.preferred_taints = wanted.required_taints, wanted.preferred_taints
    request.allowed = _allowed(body, workers)


def _allowed(body: SelectBody, workers: Mapping[int, Sequence[WorkerKey]]) -> frozenset[WorkerKey] | None:
    allowed: frozenset[WorkerKey] | None = None
    if body.allowed_worker_ids is not None:
        if len(body.allowed_worker_ids) > MAX_CANDIDATES:
            raise InvalidArgument(f"allowed_worker_ids: at most {MAX_CANDIDATES}", "allowed_worker_ids")
        allowed = frozenset(
            key for worker_id in body.allowed_worker_ids for key in workers.get(worker_id) or (WorkerKey(worker_id),)
        )
    if body.pinned_worker is not None:
        pin = _pin(body.pinned_worker)
        if allowed is not None and pin not in allowed:
            raise InvalidArgument("pinned_worker: is not among allowed_worker_ids", "pinned_worker")
        allowed = frozenset((pin,))
    return allowed


def _pin(given: WorkerKey | dict[str, int]) -> WorkerKey:
    """`{"worker_id": …, "dp_rank": …}` or `[worker_id, dp_rank]`."""
    if not isinstance(given, dict):
        return given
    if "worker_id" not in given or given.keys() - {"worker_id", "dp_rank"}:
        raise InvalidArgument('pinned_worker: is {"worker_id": …, "dp_rank": …}', "pinned_worker")
    return WorkerKey(given["worker_id"], given.get("dp_rank", 0))
