"""The wish to go on, and what travels with it."""

import asyncio
import uuid

from dynamo.runtime import Context


def test_stop_callback_is_called_once_whatever_comes_after() -> None:
    context, calls = Context(), []
    context.on_stop(lambda: calls.append(1))
    context.stop_generating()
    context.kill()
    assert calls == [1]
    assert context.is_stopped()
    assert context.is_killed()


def test_stop_callback_given_too_late_is_called_at_once() -> None:
    context, calls = Context(), []
    context.kill()
    context.on_stop(lambda: calls.append(1))
    assert calls == [1]


def test_watchers_hear_stop_and_then_kill() -> None:
    context, heard = Context(), []
    context.watch(heard.append)
    context.stop_generating()
    context.stop_generating()
    context.kill()
    assert heard == ["stop", "kill"]


def test_a_callback_that_fails_keeps_no_other_from_hearing() -> None:
    context, heard = Context(), []
    context.on_stop(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    context.watch(heard.append)
    context.kill()
    assert heard == ["kill"]


def test_a_watcher_that_left_hears_nothing() -> None:
    context, heard = Context(), []
    context.watch(heard.append)
    context.unwatch(heard.append)
    context.kill()
    assert heard == []


async def test_killed_or_stopped_can_be_awaited() -> None:
    context = Context()
    waiting = context.async_killed_or_stopped()
    asyncio.get_running_loop().call_soon(context.stop_generating)
    assert await asyncio.wait_for(waiting, 5) is True


def test_detached_shares_metadata_and_trace_but_not_cancellation() -> None:
    context = Context("one", {"tenant": "a"})
    other = context.detached("two")
    context.kill()
    assert (other.id(), other.metadata, other.trace_id) == ("two", {"tenant": "a"}, context.trace_id)
    assert other.parent_span_id == context.span_id
    assert not other.is_stopped()


def test_identity_metadata_and_trace_survive_the_hop() -> None:
    sent = Context("req-1", {"tenant": "a", "Größe": "ä"})
    got = Context.from_headers(sent.to_headers())
    assert (got.id(), got.metadata) == ("req-1", {"tenant": "a", "Größe": "ä"})
    assert got.trace_id == sent.trace_id
    assert got.parent_span_id == sent.span_id
    assert got.span_id != sent.span_id


def test_an_incoming_trace_is_continued_with_its_state_and_request_id() -> None:
    context = Context()
    context.set_trace(
        {
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
            "tracestate": "vendor=1",
            "x-request-id": "from-the-client",
        }
    )
    headers = context.trace_headers()
    assert headers["traceparent"] == f"00-0af7651916cd43dd8448eb211c80319c-{context.span_id}-00"
    assert headers["tracestate"] == "vendor=1"
    assert headers["x-request-id"] == "from-the-client"


def test_a_request_without_an_id_gets_a_uuid_of_its_own() -> None:
    one, other = Context().id(), Context().id()
    assert one != other
    assert str(uuid.UUID(one)) == one
    assert uuid.UUID(one).version == 4
    assert uuid.UUID(one).variant == uuid.RFC_4122


def test_first_token_is_noted_once() -> None:
    context, calls = Context(), []
    context.on_first_token(lambda: calls.append(1))
    context.notify_first_token()
    first = context.first_token_ns
    context.notify_first_token()
    context.on_first_token(lambda: calls.append(2))
    assert context.first_token_ns == first
    assert calls == [1, 2]
