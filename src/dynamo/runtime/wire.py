"""What do the two ends of a request plane connection say to each other, byte by byte?

Both sides open with `DYN1` and a version byte. Then frames: u32 big-endian length of what follows, u8 kind,
msgpack body. Streams are numbered by the caller. Bodies are arrays:

    HELLO    [max_message_bytes, process]         each side, first; at most 4 KiB
    REQUEST  [stream, path, headers, payload]     caller; path "{iid:x}/{ns}/{comp}/{ep}"
    DATA     [stream, item]                       caller, on a bidirectional stream
    END      [stream]                             caller has no more DATA
    CANCEL   [stream, "stop" | "kill"]            caller
    FLOW     [stream, go]                         caller cannot (false) or can (true) take more of this stream
    ITEMS    [streams, items, ended]              worker; item i belongs to stream i; then `ended` have ended
    ERROR    [stream, WireError]                  worker; the stream has failed
    LEAVING  [paths]                              worker asks for no more requests to these
    LEFT     [paths]                              caller has heard, and has sent its last request there
    PING     []  PONG []                          caller asks, worker answers
    REFUSED  [stream, WireError]                  worker; the stream has failed, no handler ever saw the request

All that a worker sends in one turn of its event loop to one caller is in one ITEMS frame.
"""

import struct
from typing import Annotated, Any

import msgspec

from dynamo.runtime.errors import UNDECODABLE, InvalidArgument, WireError
from dynamo.runtime.options import env_number

PREAMBLE = b"DYN1\x01"
HEADER_BYTES = 5
DEFAULT_MAX_MESSAGE_BYTES = 32 << 20  # DYN_TCP_MAX_MESSAGE_SIZE
MAX_GREETING_BYTES = 4096  # of the first frame: a stranger makes nobody keep more

HELLO, REQUEST, DATA, END, CANCEL, FLOW, ITEMS, ERROR, LEAVING, LEFT, PING, PONG, REFUSED = range(1, 14)

_HEADER = struct.Struct(">IB")
_LENGTH = struct.Struct(">I")


class ProtocolError(Exception):
    """The peer sent what no peer of ours sends."""


MALFORMED = (ProtocolError, *UNDECODABLE)
"""What reading a frame of a peer that is not ours may raise."""


class Hello(msgspec.Struct, array_like=True):
    """The first frame of each side. `process` names the peer in logs."""

    max_message_bytes: Annotated[int, msgspec.Meta(ge=MAX_GREETING_BYTES)] = DEFAULT_MAX_MESSAGE_BYTES
    process: str = ""


class Request(msgspec.Struct, array_like=True):
    """One request as it arrives."""

    stream: int
    path: str
    headers: dict[str, str]
    payload: msgspec.Raw


class Data(msgspec.Struct, array_like=True):
    """One more item of a bidirectional request."""

    stream: int
    item: msgspec.Raw


class End(msgspec.Struct, array_like=True):
    """The caller's side of a bidirectional stream is finished."""

    stream: int


class Cancel(msgspec.Struct, array_like=True):
    """`level` is "stop" or "kill"."""

    stream: int
    level: str


class Flow(msgspec.Struct, array_like=True):
    """Whether the caller takes more of this stream."""

    stream: int
    go: bool


class Items(msgspec.Struct, array_like=True):
    """One turn of the worker's loop."""

    streams: list[int]
    items: list[msgspec.Raw]
    ended: list[int]


class Failed(msgspec.Struct, array_like=True):
    """One stream's error."""

    stream: int
    error: WireError


def encode_foreign(value: Any) -> Any:
    """msgspec's hook for what it does not know: pydantic models, numpy scalars and arrays, sets of those."""
    for method in ("model_dump", "tolist", "item"):
        convert = getattr(value, method, None)
        if convert is not None:
            return convert()
    raise TypeError(f"{type(value).__name__} objects cannot be sent: use dict, list, str, numbers, bytes or a Struct")


UNSENDABLE = (TypeError, ValueError, OverflowError, RecursionError)
"""What encoding a user's value may raise."""

_encoder = msgspec.msgpack.Encoder(enc_hook=encode_foreign)
encode = _encoder.encode
_encode_into = _encoder.encode_into
decode = msgspec.msgpack.Decoder().decode

decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_data = msgspec.msgpack.Decoder(Data).decode
decode_end = msgspec.msgpack.Decoder(End).decode
decode_cancel = msgspec.msgpack.Decoder(Cancel).decode
decode_flow = msgspec.msgpack.Decoder(Flow).decode
decode_items = msgspec.msgpack.Decoder(Items).decode
decode_failed = msgspec.msgpack.Decoder(Failed).decode
decode_paths = msgspec.msgpack.Decoder(list[str]).decode


def frame(kind: int, body: object) -> bytearray:
    """One frame, ready to write. Raises TypeError or ValueError if `body` cannot be encoded."""
    buffer = bytearray(HEADER_BYTES)
    _encode_into(body, buffer, HEADER_BYTES)
    _HEADER.pack_into(buffer, 0, len(buffer) - 4, kind)
    return buffer


PING_FRAME = bytes(frame(PING, ()))
PONG_FRAME = bytes(frame(PONG, ()))


def max_message_bytes() -> int:
    """The largest frame that this process takes. Raises ValueError naming the variable."""
    limit = int(env_number("DYN_TCP_MAX_MESSAGE_SIZE", DEFAULT_MAX_MESSAGE_BYTES))
    if limit < MAX_GREETING_BYTES:
        raise ValueError(f"DYN_TCP_MAX_MESSAGE_SIZE: {limit} is less than the {MAX_GREETING_BYTES} of a greeting")
    return limit


def check_size(buffer: bytearray, max_bytes: int, what: str) -> None:
    """Raise InvalidArgument if a frame is larger than the peer takes."""
    if len(buffer) - 4 > max_bytes:
        raise InvalidArgument(
            f"{what} is {len(buffer)} bytes, over the limit of {max_bytes}: send less, "
            "or raise DYN_TCP_MAX_MESSAGE_SIZE on both sides"
        )


class FrameReader:
    """Cuts what arrives into frames. Holds at most one unfinished frame; the first one is a small one."""

    def __init__(self, max_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._limit = min(MAX_GREETING_BYTES, max_bytes)
        self._partial = bytearray()
        self._need = len(PREAMBLE)
        self._greeted = False

    def feed(self, data: bytes) -> list[tuple[int, memoryview]]:
        """The frames that `data` completes, as (kind, body). Raises ProtocolError for what is not our protocol."""
        partial = self._partial
        if partial or not self._greeted:
            partial += data
            if len(partial) < self._need and self._greeted:
                return []
            if not self._greeted:
                self._check_preamble()
                if not self._greeted:
                    return []
            data = bytes(partial)
            partial.clear()
        frames: list[tuple[int, memoryview]] = []
        view = memoryview(data)
        position, end = 0, len(data)
        need = 4
        while end - position >= 4:
            (length,) = _LENGTH.unpack_from(data, position)
            if not 0 < length <= self._limit:
                raise ProtocolError(f"a frame of {length} bytes (at least 1 and at most {self._limit} are taken)")
            need = length + 4
            if end - position < need:
                break
            frames.append((data[position + 4], view[position + HEADER_BYTES : position + need]))
            self._limit = self._max_bytes
            position += need
            need = 4
        if position < end:
            partial += view[position:]
        self._need = need
        return frames

    def _check_preamble(self) -> None:
        got = self._partial[: len(PREAMBLE)]
        if not PREAMBLE.startswith(got):
            raise ProtocolError(f"an opening of {bytes(got)!r} instead of {PREAMBLE!r}")
        if len(got) == len(PREAMBLE):
            del self._partial[: len(PREAMBLE)]
            self._greeted = True
            self._need = 4
