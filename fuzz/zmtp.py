"""What does a subscriber make of a publisher's bytes, in the clear and sealed?"""

import zmq
from nacl.bindings import crypto_box_afternm

from dynamo.runtime.curve_session import CurveSession
from dynamo.runtime.zmtp import ZmtpSubscription, frame, greeting
from fuzz.harness import BrokenError, Transport, feed, settle

MAX_BYTES = 1 << 14
READY = b"\4\x19\5READY\x0bSocket-Type\0\0\0\3PUB"
CLEAR = greeting(b"NULL") + READY
SHARED = bytes(32)
KEYS = zmq.curve_keypair()
SEEDS = [
    b"\0\0" + CLEAR + b"\1\2kv\1\x08" + bytes(8) + b"\0\4body",
    b"\0\5" + CLEAR + b"\4\x0a\4PING\0\x0aabc" + b"\2" + (300).to_bytes(8, "big") + bytes(300),
    b"\0\0" + greeting(b"NULL") + b"\4\x0a\5ERROR\3bad",
    b"\1\0" + b"\1\2kv\1\x08" + bytes(8) + b"\0\4body" + b"\2\x0a\4PING\0\x0aabc",
    b"\2\0" + greeting(b"CURVE") + b"\4\xa8\7WELCOME" + bytes(160),
]


def sealed(data: bytes) -> bytes:
    """Flags, length, body, and so on, sealed as a publisher would seal them."""
    out, at, number = b"", 0, 1
    while at + 2 <= len(data):
        body = data[at + 2 : at + 2 + data[at + 1]]
        number += 1
        count = number.to_bytes(8, "big")
        out += frame(
            b"\7MESSAGE" + count + crypto_box_afternm(data[at : at + 1] + body, b"CurveZMQMESSAGES" + count, SHARED)
        )
        at += 2 + len(body)
    return out


async def one(data: bytes) -> None:
    """The first byte: 0 in the clear, 1 sealed frames, 2 a handshake of CURVE."""
    mode, data = (data[0] % 3 if data else 0), data[1:]
    messages: list[list[bytes]] = []

    def on_message(frames: list[bytes]) -> None:
        if not link.connected:
            raise BrokenError("a message before the handshake was over")
        messages.append(frames)
        if sum(map(len, frames)) > MAX_BYTES + 64:
            raise BrokenError("a message over the limit")

    def secure() -> CurveSession:
        session = CurveSession(*KEYS, KEYS[0])
        if mode == 1:
            session._shared, session.ready = SHARED, True
        return session

    link = ZmtpSubscription("127.0.0.1", 1, b"kv", MAX_BYTES, on_message, lambda: None, secure if mode else None)
    transport = Transport(link)
    link.connection_made(transport)
    if mode == 1:
        link._greeted = link.connected = True
        data = data[:1] + sealed(data[1:])
    feed(link, transport, data)
    held = len(link._kept) + link._message_bytes
    if held > 2 * MAX_BYTES + 256 or len(link._frames) > 65:
        raise BrokenError(f"{held} bytes are held, and {len(link._frames)} frames")
    transport.abort()
    await settle()
