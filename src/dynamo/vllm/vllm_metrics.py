"""Which of vLLM's own metrics does a scrape of this worker see?

vLLM registers its `vllm:*` families with `prometheus_client`'s global registry. They are shown as they are, with this
worker's labels added where the scrape is put together; what else lives in that registry is not ours to publish.
"""

from collections.abc import Iterator
from typing import Any

PREFIX = "vllm:"


class _VllmFamilies:
    """The part of the global registry that is vLLM's, in the shape that `generate_latest` reads."""

    def collect(self) -> Iterator[Any]:
        from prometheus_client import REGISTRY

        return (family for family in REGISTRY.collect() if family.name.startswith(PREFIX))


def prometheus_text() -> bytes:
    """vLLM's metrics in Prometheus' text format; empty while the engine keeps none (`--disable-log-stats`)."""
    from prometheus_client import generate_latest

    return bytes(generate_latest(_VllmFamilies()))
