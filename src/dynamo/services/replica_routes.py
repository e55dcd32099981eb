"""Which paths tell a service of its replicas?"""

import msgspec
from aiohttp import web

from dynamo.services.bodies import decode
from dynamo.services.replica_link import ReplicaLink
from dynamo.services.web import OK, HttpService, reply


class ReplicaBody(msgspec.Struct):
    """Where a replica publishes what it books."""

    endpoint: str


class ReplicaRoutes:
    """`/replica_sync/...`."""

    def __init__(self, service: HttpService, link: ReplicaLink) -> None:
        self._link = link
        service.route("GET", "/replica_sync/peers", self._peers)
        service.route("POST", "/replica_sync/register_peer", self._register)
        service.route("POST", "/replica_sync/deregister_peer", self._deregister)
        service.gauge("replica_peers", "Replicas that are listened to", lambda: len(link.peers))

    async def _peers(self, _: web.Request) -> web.Response:
        return reply(self._link.peers)

    async def _register(self, request: web.Request) -> web.Response:
        new = self._link.add_peer(decode(await request.read(), ReplicaBody).endpoint)
        return reply(OK, 201 if new else 200)

    async def _deregister(self, request: web.Request) -> web.Response:
        self._link.remove_peer(decode(await request.read(), ReplicaBody).endpoint)
        return reply(OK)
