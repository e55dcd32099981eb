"""How do the processes find and reach each other: what servers are there for it, and what do they keep?"""

import asyncio
import base64
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from chaos.fleet import Kind, Member
from chaos.network import Network

ETCD_MEMBERS = 3
CLIENT_PORT, PEER_PORT, NATS_PORT = 2379, 2380, 4222
SERVER_READY_S = 30.0  # an election takes a second, or a few on a loaded machine

Keys = Callable[[], Awaitable[list[str]]]


@dataclass(frozen=True)
class Backend:
    """`hosts`: names of those that its servers need. `environ`: by which all others find them."""

    name: str
    hosts: tuple[str, ...]
    members: Callable[[Network, Path], list[Member]]
    environ: Callable[[Network], dict[str, str]]
    keys: Callable[[Network, Path], Awaitable[list[str]]]
    """What stands in discovery, past the code under test. The directory is the disk that all share."""
    wait_ready: Callable[[Network], Awaitable[None]]


def program(name: str) -> str:
    """A server that is installed beside this Python, or on the PATH. Raises SystemExit."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"chaos: there is no {name}: make install brings it")
    return found


def _server(network: Network, name: str, kind: Kind, argv: list[str], logs: Path) -> Member:
    return Member(name, kind, network.on(name, argv), dict(os.environ), logs / f"{name}.log")


# --- a directory


async def _file_keys(_: Network, shared: Path) -> list[str]:
    found = [path.name for path in (shared / "discovery").rglob("*") if path.is_file()]
    return [name for name in found if not name.startswith(".")]


async def _nothing(_: Network) -> None:
    """There is no server to wait for."""


FILE = Backend(
    "file", (), lambda network, logs: [], lambda network: {"DYN_DISCOVERY_BACKEND": "file"}, _file_keys, _nothing
)


# --- etcd


ETCD_HOSTS = tuple(f"e{i}" for i in range(ETCD_MEMBERS))


def _etcd_members(network: Network, logs: Path) -> list[Member]:
    url = {name: f"http://{network.addresses[name]}" for name in ETCD_HOSTS}
    cluster = ",".join(f"{name}={url[name]}:{PEER_PORT}" for name in ETCD_HOSTS)
    members = []
    for name in ETCD_HOSTS:
        client, peer = f"{url[name]}:{CLIENT_PORT}", f"{url[name]}:{PEER_PORT}"
        data = logs / f"{name}.data"
        shutil.rmtree(data, ignore_errors=True)
        argv = [program("etcd"), "--name", name, "--data-dir", str(data), "--unsafe-no-fsync"]
        argv += ["--listen-client-urls", client, "--advertise-client-urls", client]
        argv += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        argv += ["--initial-cluster", cluster]
        members.append(_server(network, name, "etcd", argv, logs))
    return members


def _etcd_environ(network: Network) -> dict[str, str]:
    urls = (f"http://{network.addresses[name]}:{CLIENT_PORT}" for name in ETCD_HOSTS)
    return {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": ",".join(urls)}


async def _etcd_keys(network: Network, _: Path | None = None) -> list[str]:
    ends = {"key": base64.b64encode(b"v1/").decode(), "range_end": base64.b64encode(b"v10").decode()}
    url = f"http://{network.addresses[ETCD_HOSTS[0]]}:{CLIENT_PORT}/v3/kv/range"
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, json=ends) as response:
        response.raise_for_status()
        found = (await response.json(content_type=None)).get("kvs", [])
    return [base64.b64decode(each["key"]).decode() for each in found]


async def _etcd_ready(network: Network) -> None:
    async with asyncio.timeout(SERVER_READY_S):
        while True:
            try:
                await _etcd_keys(network)
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(0.1)
            else:
                return


ETCD = Backend("etcd", ETCD_HOSTS, _etcd_members, _etcd_environ, _etcd_keys, _etcd_ready)


# --- NATS, for events and requests; who is there stands in etcd


NATS_HOST = "n0"


def _nats_members(network: Network, logs: Path) -> list[Member]:
    argv = [program("nats-server"), "-a", network.addresses[NATS_HOST], "-p", str(NATS_PORT), "-js"]
    store = logs / "nats.data"
    shutil.rmtree(store, ignore_errors=True)
    return [*_etcd_members(network, logs), _server(network, NATS_HOST, "nats", [*argv, "-sd", str(store)], logs)]


def _nats_environ(network: Network) -> dict[str, str]:
    server = f"nats://{network.addresses[NATS_HOST]}:{NATS_PORT}"
    return {**_etcd_environ(network), "NATS_SERVER": server, "DYN_EVENT_PLANE": "nats", "DYN_REQUEST_PLANE": "nats"}


def _nats_events_environ(network: Network) -> dict[str, str]:
    return {**_nats_environ(network), "DYN_REQUEST_PLANE": "tcp"}


NATS = Backend("nats", (*ETCD_HOSTS, NATS_HOST), _nats_members, _nats_environ, _etcd_keys, _etcd_ready)
EVENTS = Backend("nats-events", NATS.hosts, _nats_members, _nats_events_environ, _etcd_keys, _etcd_ready)

BACKENDS = {backend.name: backend for backend in (FILE, ETCD, EVENTS, NATS)}
