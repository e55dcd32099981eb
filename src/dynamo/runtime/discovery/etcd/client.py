"""How does a program keep things of its own in etcd? The raw client of ai-dynamo's first generation (facts row R14)."""

from typing import Any

from dynamo.runtime.discovery.etcd.errors import KeyTaken
from dynamo.runtime.discovery.etcd.gateway import EtcdGateway
from dynamo.runtime.discovery.etcd.messages import PUT, RANGE, TXN, Done, Ranged, TxnAnswer, prefix_range
from dynamo.runtime.discovery.etcd.owned import OPERATION_S


class EtcdClient:
    """Keys beside discovery's. Without a `lease_id` they stay until they are deleted. All raise DiscoveryError."""

    def __init__(self, gateway: EtcdGateway) -> None:
        self._gateway = gateway

    async def kv_create_or_validate(self, key: str, value: bytes, lease_id: int | None = None) -> None:
        """Put a key that is not there; one that is must have this value, else KeyTaken is raised."""
        name = key.encode()
        body = {
            "compare": [{"key": name, "target": "CREATE", "create_revision": "0"}],
            "success": [{"request_put": _put(key, value, lease_id)}],
            "failure": [{"request_range": {"key": name}}],
        }
        answer = await self._gateway.call(TXN, body, TxnAnswer, OPERATION_S)
        if not answer.succeeded and answer.responses[0].response_range.kvs[0].value != value:
            raise KeyTaken(f"{key} is there with another value")

    async def kv_put(self, key: str, value: bytes, lease_id: int | None = None) -> None:
        """Put a key, whatever was there."""
        await self._gateway.call(PUT, _put(key, value, lease_id), Done, OPERATION_S)

    async def kv_get_prefix(self, prefix: str) -> list[dict[str, Any]]:
        """All keys that start with `prefix`: `key`, `value`, `create_revision`, `mod_revision`, `version`, `lease`."""
        answer = await self._gateway.call(RANGE, prefix_range(prefix), Ranged, OPERATION_S)
        return [
            {
                "key": kv.key.decode(errors="replace"),
                "value": kv.value,
                "create_revision": kv.create_revision,
                "mod_revision": kv.mod_revision,
                "version": kv.version,
                "lease": kv.lease,
            }
            for kv in answer.kvs
        ]


def _put(key: str, value: bytes, lease_id: int | None) -> dict[str, Any]:
    return {"key": key.encode(), "value": value, "lease": str(lease_id or 0)}
