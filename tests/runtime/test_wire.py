"""Frames, and whatever else a socket may bring."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.runtime import wire
from dynamo.runtime.errors import InvalidArgument

KINDS = st.integers(1, 255)


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.tuples(KINDS, st.binary(max_size=300)), max_size=10), st.lists(st.integers(0, 10**6), max_size=30))
def test_frames_arrive_whole_however_the_stream_is_cut(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    stream = wire.PREAMBLE + b"".join(wire.frame(kind, body) for kind, body in frames)
    reader = wire.FrameReader()
    got = [(kind, bytes(body)) for chunk in chunks(stream, cuts) for kind, body in reader.feed(chunk)]
    assert [(kind, wire.decode(body)) for kind, body in got] == frames


@given(st.binary(max_size=2000), st.lists(st.integers(0, 10**6), max_size=10), st.booleans())
@settings(max_examples=500)
def test_garbage_is_a_protocol_error_or_nothing(data: bytes, cuts: list[int], greeted: bool) -> None:
    reader = wire.FrameReader(max_bytes=1000)
    try:
        if greeted:
            reader.feed(wire.PREAMBLE)
        for chunk in chunks(data, cuts):
            for _, body in reader.feed(chunk):
                assert len(body) <= 1000
    except wire.ProtocolError:
        pass


def test_an_oversize_frame_is_refused_before_its_body_comes() -> None:
    reader = wire.FrameReader(max_bytes=1000)
    reader.feed(wire.PREAMBLE)
    with pytest.raises(wire.ProtocolError, match="1001 bytes"):
        reader.feed((1001).to_bytes(4, "big"))


@pytest.mark.parametrize("opening", [b"GET / HTTP/1.1\r\n", b"DYN2\x01", b"DYN1\x02", b"\x16\x03\x01"])
def test_a_wrong_opening_is_refused(opening: bytes) -> None:
    with pytest.raises(wire.ProtocolError, match="opening"):
        wire.FrameReader().feed(opening)


def test_a_frame_of_length_zero_is_refused() -> None:
    with pytest.raises(wire.ProtocolError):
        wire.FrameReader().feed(wire.PREAMBLE + bytes(4))


def test_foreign_values_are_sent_as_plain_ones() -> None:
    class Model:
        def model_dump(self) -> dict[str, Any]:
            return {"a": 1}

    class Scalar:
        def item(self) -> float:
            return 0.5

    body = wire.frame(wire.DATA, [Model(), Scalar(), {1, 2}])[wire.HEADER_BYTES :]
    assert wire.decode(body) == [{"a": 1}, 0.5, [1, 2]]


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match="object objects cannot be sent"):
        wire.frame(wire.DATA, object())


def test_a_request_over_the_limit_is_an_invalid_argument() -> None:
    with pytest.raises(InvalidArgument, match="DYN_TCP_MAX_MESSAGE_SIZE"):
        wire.check_size(wire.frame(wire.REQUEST, b"x" * 100), 50, "the request")
