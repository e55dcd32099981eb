"""Are the ports free that the programs would listen on?"""

import errno
import http.client
import json
import os
import socket
from collections.abc import Mapping

from dynamo.doctor.facts import Port, Ports

FRONTEND = "8000"
PROBE_S = 0.3  # a frontend of this machine answers in a millisecond
_PURPOSES = (
    ("DYN_HTTP_PORT", "DYN_HTTP_HOST", FRONTEND, "frontend"),
    ("DYN_SYSTEM_PORT", "DYN_SYSTEM_HOST", "", "system server"),
    ("DYN_TCP_RPC_PORT", "DYN_TCP_RPC_HOST", "", "request plane"),
)


def ports(environ: Mapping[str, str] = os.environ) -> Ports:
    """The ports that variables name, and the frontend's. Raises ValueError for a port that is no number."""
    found = []
    for variable, host_variable, default, purpose in _PURPOSES:
        text = environ.get(variable, "").strip() or default
        if text and not (text.lstrip("-").isdigit() and int(text) < 2**16):
            raise ValueError(f"{variable}: {text!r} is not a port")
        if text and int(text) > 0:
            host = environ.get(host_variable, "").strip() or "127.0.0.1"
            found.append(Port(int(text), purpose, _state(host, int(text))))
    return Ports(tuple(found))


def _state(host: str, number: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            s.bind((host, number))
        except PermissionError:
            return "forbidden"
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                return "ours" if _is_a_frontend(host, number) else "taken"
            raise
    return "free"


def _is_a_frontend(host: str, number: int) -> bool:
    connection = http.client.HTTPConnection(host, number, timeout=PROBE_S)
    try:
        connection.request("GET", "/health")
        body = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return isinstance(body, dict) and "instances" in body
