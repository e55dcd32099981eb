"""What does a web address answer? One GET on the standard library, in bounded time."""

import http.client
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

ENOUGH_BYTES = 65536  # of answers that have a few hundred


def get(
    url: str, within_s: float, headers: Mapping[str, str] | None = None, context: ssl.SSLContext | None = None
) -> tuple[int, bytes]:
    """Status and body. `context` is for https, the system's authorities without one.

    Raises OSError if the address cannot be reached, HTTPException if it does not speak HTTP.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = context or ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, parts.port, timeout=within_s, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=within_s)
    try:
        connection.request("GET", parts.path, headers=dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read(ENOUGH_BYTES)
    finally:
        connection.close()
