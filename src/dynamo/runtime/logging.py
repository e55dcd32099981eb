"""Where does `from dynamo.runtime.logging import configure_dynamo_logging` come from?

The name that workers written for Dynamo import. The work is done in `dynamo.runtime.logs`.
"""

from typing import Any

from dynamo.runtime.logs import configure_logging

__all__ = ["configure_dynamo_logging"]


def configure_dynamo_logging(service_name: str | None = None, worker_id: int | None = None, **_: Any) -> None:
    """Set logging up from the environment. The arguments of older versions are accepted and change nothing."""
    configure_logging()
