"""What does this process hold in etcd, and how does it keep it? One lease, renewed, and the keys under it."""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from dynamo.runtime.discovery.etcd.errors import EtcdUnavailable, KeyTaken, LeaseExists, LeaseGone
from dynamo.runtime.discovery.etcd.gateway import EtcdGateway
from dynamo.runtime.discovery.etcd.messages import (
    GRANT,
    KEEP_ALIVE,
    LEFT,
    PUT,
    REVOKE,
    TIME_TO_LIVE,
    TXN,
    Done,
    KeepAliveAnswer,
    KeyValue,
    Lease,
    TxnAnswer,
)
from dynamo.runtime.errors import DiscoveryError

log = logging.getLogger(__name__)

OPERATION_S = 10.0  # one lease: an etcd that is away for longer is an error of the operation
TXN_KEYS = 100  # etcd takes 128 operations in one transaction
REVOKE_S = 5.0  # a process that ends waits no longer; its keys then go with the lease's time


class OwnedKeys:
    """The keys of this process. They outlive a lost lease: they are put again under a new one."""

    def __init__(self, gateway: EtcdGateway) -> None:
        self._gateway = gateway
        self._lease: int | None = None
        self._former: set[int] = set()
        self._values: dict[str, bytes] = {}
        self._doubtful: set[str] = set()
        """Keys whose last operation failed half-way: etcd may or may not have carried it out."""
        self._outages = 0
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    async def put(self, key: str, value: bytes, create: bool) -> None:
        """See `Discovery.put`."""
        async with self._one_at_a_time:
            self._doubtful.add(key)
            await self._put(key, value, create and key not in self._values)
            self._values[key] = value
            self._doubtful.discard(key)

    async def delete(self, key: str) -> None:
        """See `Discovery.delete`. If etcd is away it fails at once, and is made good when etcd is back."""
        async with self._one_at_a_time:
            if self._values.pop(key, None) is None:
                return
            self._doubtful.add(key)
            if self._gateway.down:
                raise EtcdUnavailable(f"etcd does not answer: {key} is deleted when it is back, or with the lease")
            await self._remove(key)
            self._doubtful.discard(key)

    async def beat(self) -> None:
        """Renew the lease; put the keys under a new one if it is lost; make good what an outage spoilt.

        Raises EtcdUnavailable, EtcdRefused.
        """
        lease = self._lease
        if lease is None and not self._values:
            await self._gateway.ping()
            return
        if lease is not None:
            answer = await self._gateway.call(KEEP_ALIVE, {"ID": str(lease)}, KeepAliveAnswer)
            if answer.result.ttl > 0:
                await self._make_good()
                return
        async with self._one_at_a_time:
            if self._lease == lease:  # else a put has found out before us
                await self._begin_again()

    async def close(self) -> None:
        """Give the lease back, and with it all keys. Never raises: what cannot be given back ends by itself."""
        self._closed = True
        lease, self._lease = self._lease, None
        if lease is None:
            return
        try:
            async with asyncio.timeout(REVOKE_S):
                await self._say_left(lease, tuple(self._values))
                await self._gateway.call(REVOKE, {"ID": str(lease)}, Done)
        except LeaseGone:
            pass
        except (DiscoveryError, TimeoutError) as e:
            log.warning("leaving etcd: %s; our %d keys end with their lease", e, len(self._values))

    # --- the lease

    async def _hold_lease(self) -> int:
        """The lease, granted if there is none. Its number is ours to choose, so that a lost answer leaves no second."""
        if self._lease is None:
            if self._closed:
                raise EtcdUnavailable("discovery is closed")
            number = secrets.randbelow((1 << 63) - 1) + 1
            wanted = {"ID": str(number), "TTL": str(self._gateway.settings.ttl_s)}
            try:
                await self._gateway.call(GRANT, wanted, Done, OPERATION_S)
            except LeaseExists:
                log.debug("the answer to the grant of lease %x had been lost", number)
            self._lease = number
        return self._lease

    async def _begin_again(self) -> None:
        """Put all keys under a new lease. Raises EtcdUnavailable, and what is missing then is put by a later beat."""
        if self._lease is not None:
            log.warning("etcd lease %x is lost; putting %d keys under a new one", self._lease, len(self._values))
            self._former.add(self._lease)
            self._lease = None
        self._doubtful |= self._values.keys()
        for key in tuple(self._doubtful):
            await self._settle(key)

    async def _make_good(self) -> None:
        """After an outage, or an operation that failed half-way: let etcd hold what we hold, no more and no less."""
        outages = self._gateway.outages
        if outages == self._outages and not self._doubtful:
            return
        async with self._one_at_a_time:
            if outages != self._outages:
                asked = {"ID": str(self._lease), "keys": True}
                held = (await self._gateway.call(TIME_TO_LIVE, asked, Lease)).keys
                self._doubtful |= self._values.keys() - {key.decode(errors="replace") for key in held}
                self._outages = outages
            for key in tuple(self._doubtful):
                await self._settle(key)

    async def _settle(self, key: str) -> None:
        try:
            if key in self._values:
                await self._claim(key, self._values[key], await self._hold_lease())
            else:
                await self._remove(key)
        except LeaseGone:
            return  # again? The next beat sees to it
        except KeyTaken as e:
            del self._values[key]
            log.error("%s; this process no longer claims it", e)  # noqa: TRY400 - it says all
        self._doubtful.discard(key)

    # --- one key

    async def _put(self, key: str, value: bytes, create: bool) -> None:
        try:
            await self._write(key, value, create, await self._hold_lease())
        except LeaseGone:
            await self._begin_again()
            try:
                await self._write(key, value, create, await self._hold_lease())
            except LeaseGone as e:
                raise EtcdUnavailable(f"etcd forgets leases as fast as it grants them: {e}") from e

    async def _write(self, key: str, value: bytes, create: bool, lease: int) -> None:
        if create:
            await self._claim(key, value, lease)
        else:
            await self._gateway.call(PUT, _put_request(key, value, lease), Done, OPERATION_S)

    async def _claim(self, key: str, value: bytes, lease: int) -> None:
        """Put a key that nobody holds, or we do. Raises KeyTaken if somebody else does."""
        put = {"request_put": _put_request(key, value, lease)}
        absent = {"key": key.encode(), "target": "CREATE", "create_revision": "0"}
        look = {"request_range": {"key": key.encode()}}
        answer = await self._transact(absent, put, look)
        while not answer.succeeded:
            held = answer.responses[0].response_range.kvs
            if held and not self._is_ours(held[0], lease):
                raise KeyTaken(f"{key} is already taken: {_holder(held[0])}")
            same = absent if not held else _compare(key, "MOD", "mod_revision", held[0].mod_revision)
            answer = await self._transact(same, put, look)

    async def _remove(self, key: str) -> None:
        """Delete a key if it is still under our lease."""
        if self._lease is not None:
            await self._say_left(self._lease, (key,))
            condition = _compare(key, "LEASE", "lease", self._lease)
            await self._transact(condition, {"request_delete_range": {"key": key.encode()}}, None, within_s=0.0)

    async def _say_left(self, lease: int, keys: Sequence[str]) -> None:
        """Tell watchers that these do not go because a lease ended by mistake."""
        for at in range(0, len(keys), TXN_KEYS):
            some = keys[at : at + TXN_KEYS]
            conditions = [_compare(key, "LEASE", "lease", lease) for key in some]
            puts = [{"request_put": _put_request(key, LEFT, lease)} for key in some]
            await self._gateway.call(TXN, {"compare": conditions, "success": puts}, TxnAnswer)

    async def _transact(
        self,
        condition: dict[str, Any],
        success: dict[str, Any],
        failure: dict[str, Any] | None,
        within_s: float = OPERATION_S,
    ) -> TxnAnswer:
        body = {"compare": [condition], "success": [success], "failure": [failure] if failure else []}
        return await self._gateway.call(TXN, body, TxnAnswer, within_s)

    def _is_ours(self, held: KeyValue, lease: int) -> bool:
        return held.lease == lease or held.lease in self._former


def _put_request(key: str, value: bytes, lease: int) -> dict[str, Any]:
    return {"key": key.encode(), "value": value, "lease": str(lease)}


def _compare(key: str, target: str, name: str, number: int) -> dict[str, Any]:
    return {"key": key.encode(), "target": target, name: str(number)}


def _holder(held: KeyValue) -> str:
    if held.lease == 0:
        return "somebody put it without a lease; if nobody needs it, delete it (etcdctl del)"
    return f"another live process holds it (etcd lease {held.lease:x})"
