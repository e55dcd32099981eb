"""How does a subscriber speak CurveZMQ with one publisher? The client's side of rfc.zeromq.org/spec/26, without I/O.

Commands in their order: HELLO, WELCOME, INITIATE, READY; then each frame of a message is sealed in a MESSAGE. In the
RFC's words C and S are the lasting keys of client and server, C' and S' those of one connection.
"""

import struct
from typing import Final

from nacl.bindings import (
    crypto_box,
    crypto_box_afternm,
    crypto_box_beforenm,
    crypto_box_keypair,
    crypto_box_open,
    crypto_box_open_afternm,
)
from nacl.exceptions import CryptoError
from nacl.utils import random
from zmq.utils import z85

_WELCOME, _READY, _MESSAGE, _ERROR = b"\7WELCOME", b"\5READY", b"\7MESSAGE", b"\5ERROR"
_WELCOME_BYTES: Final = 168
_OVERHEAD: Final = len(_MESSAGE) + 8 + 16 + 1  # name, number, what the box adds, flags
_MAX_NUMBER: Final = (1 << 64) - 1


class CurveSession:
    """One connection's keys and numbers. Keys are given as Z85. What is wrong raises ValueError."""

    def __init__(self, public: bytes, secret: bytes, publisher: bytes) -> None:
        self.ready = False
        self._public, self._secret, self._publisher = map(z85.decode, (public, secret, publisher))
        self._short_public, self._short_secret = crypto_box_keypair()
        self._said = self._heard = 0
        self._shared = b""

    def hello(self) -> bytes:
        """The first command."""
        number = self._number()
        box = crypto_box(bytes(64), b"CurveZMQHELLO---" + number, self._publisher, self._short_secret)
        return b"\5HELLO\1\0" + bytes(72) + self._short_public + number + box

    def answer(self, command: bytes, metadata: bytes) -> bytes | None:
        """The next command, which tells our metadata; None once the publisher has said READY."""
        try:
            if command.startswith(_WELCOME) and not self._shared:
                return self._initiate(command, metadata)
            if command.startswith(_READY) and self._shared:
                self._open(command, len(_READY), b"CurveZMQREADY---")
                self.ready = True
                return None
        except CryptoError:
            raise ValueError("its key is not the one in its record, or what it said was changed on the way") from None
        if command.startswith(_ERROR + b"\x03400"):
            raise ValueError("it does not know our key (DYN_EVENT_PLANE_CURVE_PEERS_PATH there)")
        if command.startswith(_ERROR):
            raise ValueError(f"the publisher says {command[7:].decode(errors='replace')!r}")
        raise ValueError("it does not speak CURVE as a publisher does")

    def _initiate(self, command: bytes, metadata: bytes) -> bytes:
        if len(command) != _WELCOME_BYTES:
            raise ValueError(f"a welcome of {len(command)} bytes")
        opened = crypto_box_open(command[24:], b"WELCOME-" + command[8:24], self._publisher, self._short_secret)
        short_publisher, cookie = opened[:32], opened[32:]
        self._shared = crypto_box_beforenm(short_publisher, self._short_secret)
        nonce = random(16)
        vouch = crypto_box(self._short_public + self._publisher, b"VOUCH---" + nonce, short_publisher, self._secret)
        number = self._number()
        box = crypto_box_afternm(self._public + nonce + vouch + metadata, b"CurveZMQINITIATE" + number, self._shared)
        return b"\x08INITIATE" + cookie + number + box

    def seal(self, body: bytes, flags: int) -> bytes:
        """The body of a frame that holds another one."""
        number = self._number()
        return (
            _MESSAGE + number + crypto_box_afternm(bytes((flags,)) + body, b"CurveZMQMESSAGEC" + number, self._shared)
        )

    def open(self, body: bytes) -> tuple[int, bytes]:
        """Flags and body of the frame that this one holds."""
        if not body.startswith(_MESSAGE) or len(body) < _OVERHEAD:
            raise ValueError("a frame that is not sealed")
        try:
            opened = self._open(body, len(_MESSAGE), b"CurveZMQMESSAGES")
        except CryptoError:
            raise ValueError("a frame that was not sealed by the publisher, or was changed on the way") from None
        return opened[0], opened[1:]

    def _open(self, body: bytes, at: int, prefix: bytes) -> bytes:
        number = body[at : at + 8]
        counted = int.from_bytes(number, "big")
        if len(number) != 8 or counted <= self._heard:
            raise ValueError("a frame that was there before")
        opened: bytes = crypto_box_open_afternm(body[at + 8 :], prefix + number, self._shared)
        self._heard = counted
        return opened

    def _number(self) -> bytes:
        self._said += 1
        assert self._said < _MAX_NUMBER
        return struct.pack(">Q", self._said)
