"""What can be told of a prompt's way once it has one: why it went there, and how its workers did?"""

from typing import TYPE_CHECKING, Any

from dynamo.frontend.route import explained_route

if TYPE_CHECKING:
    from dynamo.frontend.answer import Answer
    from dynamo.frontend.engine_stream import EngineStream


def explain(stream: "EngineStream") -> dict[str, Any]:
    """Why the prompt went where it did."""
    explained = explained_route(stream.route, stream.instance_id) | {"attempts": stream.attempts}
    if stream.split is not None:
        explained["split"] = stream.split
    if (remote := stream.remote) is not None:
        explained["prefill"] = explained_route(remote.route, remote.instance_id)
        if remote.meeting is not None:
            explained["meeting"] = remote.meeting
        if remote.near is not None:
            explained["near"] = remote.near.describe()
    return explained


def note_worker(stream: "EngineStream", answer: "Answer") -> None:
    """Count what the worker of a complete answer did, and how fast."""
    meter = answer.meter
    if stream.instance_id is None or not meter.first_token_at:
        return
    first = meter.first_token_at
    tokens = stream.completion_tokens
    ttft_s = first - stream.dispatched_at
    remote = stream.remote
    if remote is not None and remote.took_s and remote.meeting is None:
        ttft_s = remote.took_s  # the token was there before this worker was asked
    answer.metrics.roundtrip_seconds.observe(ttft_s)
    answer.metrics.worker_answered(
        stream.instance_id,
        stream.dp_rank,
        stream.prompt_tokens,
        ttft_s,
        (meter.last_token_at - first) / (tokens - 1) if tokens > 1 else 0.0,
    )
