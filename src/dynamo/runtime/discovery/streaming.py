"""How is a watch read that is one HTTP answer without end? Shared by the backends whose store is a HTTP server."""

import socket
from collections.abc import AsyncIterator

import aiohttp

# A stretched network or a firewall may forget a silent connection: the kernel asks after 10 s, gives up after 10 more.
_TCP_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2))


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines, of any length."""
    pending = bytearray()
    async for chunk in response.content.iter_any():
        pending += chunk
        end = pending.rfind(b"\n")
        if end >= 0:
            whole = bytes(pending[:end])
            del pending[: end + 1]
            for line in whole.split(b"\n"):
                yield line


def keep_alive(response: aiohttp.ClientResponse) -> None:
    """Have the kernel notice when the other side is no more."""
    transport = response.connection.transport if response.connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in _TCP_KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
