"""Which instances carry a given word in their model card?

The runtime knows one thing of model cards: `runtime_config.runtime_data`, a dict that a worker fills as it
likes. The rest is `dynamo.llm`'s.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.discovery import Delete, Discovery
from dynamo.runtime.errors import UNDECODABLE, ConnectionTimeout


class _RuntimeConfig(msgspec.Struct):
    runtime_data: dict[str, Any] = {}


class _Card(msgspec.Struct):
    runtime_config: _RuntimeConfig | None = None


def _runtime_data(card: bytes) -> dict[str, Any]:
    try:
        config = msgspec.json.decode(card, type=_Card).runtime_config
    except UNDECODABLE:
        return {}
    return config.runtime_data if config is not None else {}


async def ids_by_runtime_data(
    discovery: Discovery,
    address: EndpointAddress,
    live: Callable[[], list[int]],
    key: str,
    value: Any,
    min_count: int,
    timeout_s: float | None,
) -> list[int]:
    """See `Client.wait_for_instances_by_runtime_data`."""
    matching: set[int] = set()
    try:
        async with asyncio.timeout(timeout_s):
            async for change in discovery.watch(address.cards_prefix()):
                instance_id = _instance_id(change.key)
                if instance_id is None:
                    continue
                if not isinstance(change, Delete) and _runtime_data(change.value).get(key) == value:
                    matching.add(instance_id)
                else:
                    matching.discard(instance_id)
                found = sorted(matching.intersection(live()))
                if len(found) >= min_count:
                    return found
    except TimeoutError:
        pass
    raise ConnectionTimeout(
        f"fewer than {min_count} instance(s) of {address} with runtime data {key}={value!r} within {timeout_s} s"
    )


def _instance_id(key: str) -> int | None:
    try:
        return int(key.rpartition("/")[2], 16)
    except ValueError:
        return None
