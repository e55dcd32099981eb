"""What does the router have to know of a request that an engine will get?

A prompt is hashed once, here; the hashes go with the request to everybody who asks for them.
"""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from dynamo.llm.block_hash import BlockMmInfo, compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.protocols.engine import PreprocessedRequest, Routing
from dynamo.router.config import LINEAR_WEIGHTS
from dynamo.router.prompt_hashes import PromptHashes
from dynamo.router.stats import RouterStats
from dynamo.router.types import RouteRequest, RouterOverride, WorkerKey
from dynamo.runtime.errors import InvalidArgument

POLICY_CLASS = "policy-class"  # the request's metadata word for its policy class (header x-dynamo-meta-policy-class)
_EMPTY = Routing()
_NO_TAINTS: frozenset[str] = frozenset()


def hash_prompt(
    token_ids: Sequence[int],
    block_size: int,
    stats: RouterStats | None = None,
    *,
    block_mm_infos: Sequence[BlockMmInfo | None] | None = None,
    lora_name: str | None = None,
    is_eagle: bool | None = None,
    cache_namespace: str | None = None,
) -> list[int]:
    """The sequence hashes of a prompt's full blocks. Notes in `stats`, if given, how long it takes.

    Raises InvalidArgument as `compute_block_hash_for_seq`.
    """
    start = perf_counter()
    local_hashes = compute_block_hash_for_seq(
        token_ids, block_size, block_mm_infos, lora_name, is_eagle, cache_namespace
    )
    middle = perf_counter()
    hashes = sequence_hashes(local_hashes)
    if stats is not None:
        stats.block_hashing_ms.observe((middle - start) * 1000)
        stats.seq_hashing_ms.observe((perf_counter() - middle) * 1000)
    return hashes


def route_request(
    request_id: str,
    request: PreprocessedRequest,
    block_size: int,
    workers: Mapping[int, Sequence[WorkerKey]],
    *,
    metadata: Mapping[str, str] | None = None,
    is_eagle: bool = False,
    stats: RouterStats | None = None,
    hashes_of: PromptHashes | None = None,
    hashes: Sequence[int] | None = None,
) -> RouteRequest:
    """Read a preprocessed request. `workers` are the ranks of each worker, for pins to a worker.

    With `hashes_of` what was hashed before is looked up there; `hashes` are the prompt's own, where they are known.
    With `stats` all is hashed anew, and noted there how long it takes.

    Raises:
        InvalidArgument: an override that cannot be meant, or a rank without a worker where ranks are not alike.
    """
    routing, tokens = request.routing or _EMPTY, request.token_ids
    if hashes is None:
        if hashes_of is not None and stats is None and not is_eagle:
            hashes = hashes_of.of(tokens, routing.lora_name, routing.cache_salt)
        else:
            hashes = hash_prompt(
                tokens,
                block_size,
                stats,
                lora_name=routing.lora_name,
                is_eagle=is_eagle,
                cache_namespace=routing.cache_salt,
            )
    if says_nothing(request) and not metadata:
        return RouteRequest(request_id, len(tokens), hashes)
    return RouteRequest(
        request_id=request_id,
        token_count=len(request.token_ids),
        sequence_hashes=hashes,
        priority_jump=_priority(routing),
        strict_priority=routing.strict_priority or 0,
        policy_class=metadata.get(POLICY_CLASS) if metadata else None,
        expected_output_tokens=routing.expected_output_tokens,
        session_id=_session(request.agent_context),
        session_final=_is_final(request.agent_context),
        allowed=pinned(routing, workers),
        required_taints=frozenset(routing.required_taints) if routing.required_taints else _NO_TAINTS,
        preferred_taints=routing.preferred_taints or {},
        override=RouterOverride.parse(request.router_config_override) if request.router_config_override else None,
    )


def says_nothing(request: PreprocessedRequest) -> bool:
    """Whether a request says no word of its own to the router."""
    return request.routing is None and request.agent_context is None and not request.router_config_override


def check_override(override: RouterOverride | None, policy: str) -> None:
    """Raises InvalidArgument for a weight that the policy of that name does not have: it would change nothing."""
    if override is None or policy == "linear":
        return
    for name in LINEAR_WEIGHTS:
        if getattr(override, name, None) is not None:
            raise InvalidArgument(
                f"router_config_override.{name}: this router's policy, {policy}, has no such weight; linear has",
                "router_config_override",
            )


def _priority(routing: Routing) -> float:
    if routing.priority_jump is not None:
        return routing.priority_jump
    return float(routing.priority or 0)


def _session(agent_context: Mapping[str, Any] | None) -> str | None:
    session = agent_context.get("session_id") if agent_context else None
    return session if isinstance(session, str) and session else None


def _is_final(agent_context: Mapping[str, Any] | None) -> bool:
    return agent_context is not None and agent_context.get("session_final") in (True, "true", "True", "1")


def pinned(routing: Routing, workers: Mapping[int, Sequence[WorkerKey]]) -> frozenset[WorkerKey] | None:
    """The ranks that a request names, by worker, by rank, or by both [N5]; None if it names none."""
    worker_id = routing.backend_instance_id
    if worker_id is None:
        worker_id = routing.decode_worker_id
    return pin(worker_id, routing.dp_rank, workers)


def pin(
    worker_id: int | None, dp_rank: int | None, workers: Mapping[int, Sequence[WorkerKey]]
) -> frozenset[WorkerKey] | None:
    """The ranks of that worker, or of that number at every worker. An unknown worker stands for itself: nobody.

    Raises InvalidArgument for a rank that no worker has.
    """
    if worker_id is None:
        if dp_rank is None:
            return None
        ranks = frozenset(key for keys in workers.values() for key in keys if key.dp_rank == dp_rank)
        if not ranks and workers:
            raise InvalidArgument(f"dp_rank {dp_rank} is no worker's", "nvext.dp_rank")
        return ranks
    if dp_rank is not None:
        return frozenset((WorkerKey(worker_id, dp_rank),))
    return frozenset(workers.get(worker_id) or (WorkerKey(worker_id),))
