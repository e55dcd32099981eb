"""What does a canary send to an engine?

The names that workers written for Dynamo import; the canary is in `dynamo.runtime.health`.
"""

from typing import Any

from dynamo.runtime.health import HEALTH_CHECK_KEY, load_health_check_from_env

__all__ = ["HEALTH_CHECK_KEY", "HealthCheckPayload", "load_health_check_from_env"]


class HealthCheckPayload:
    """An engine's small request. A subclass sets `default_payload`; `DYN_HEALTH_CHECK_PAYLOAD` wins over it.

    Raises NotImplementedError if the subclass set none, ValueError if the variable is wrong.
    """

    default_payload: dict[str, Any]

    def __init__(self) -> None:
        if not hasattr(self, "default_payload"):
            raise NotImplementedError(
                f"{type(self).__name__} must set default_payload before HealthCheckPayload.__init__"
            )
        self._payload: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What to send. The variable is read once."""
        if self._payload is None:
            self._payload = load_health_check_from_env() or self.default_payload
        return self._payload

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"
