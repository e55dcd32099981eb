"""How is conditional disaggregation set, at start and while it runs? [G13]

The words are those of `--router-conditional-disagg-config`, without the prefix that they have in `KvRouterConfig`.
"""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies import POLICIES

PREFIX = "conditional_disagg_"
LEARNING = tuple(name for name, policy in POLICIES.items() if getattr(policy, "learns", False))
"""The router policies that know what a prompt token costs."""


class SplitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of the settings; what is unset stays as it is. The thresholds are explained in `dynamo.router.split`."""

    policy: str | UnsetType = UNSET
    eff_isl_threshold: int | UnsetType = UNSET
    eff_isl_ratio_threshold: float | UnsetType = UNSET
    prefill_busy_threshold: float | UnsetType | None = UNSET
    decode_busy_threshold: float | UnsetType | None = UNSET

    @classmethod
    def from_json(cls, text: str) -> "SplitSettings":
        """From a JSON object of these fields. Raises ValueError naming the field, or what else is wrong."""
        try:
            return msgspec.json.decode(text.encode(), type=cls)
        except (msgspec.DecodeError, UnicodeError) as e:
            raise ValueError(str(e)) from None

    @classmethod
    def of(cls, config: KvRouterConfig) -> dict[str, Any]:
        """All of them, as they are."""
        return {name: getattr(config, f"{PREFIX}{name}") for name in cls.__struct_fields__}

    def fields(self) -> dict[str, Any]:
        """What is set, by its name in `KvRouterConfig`."""
        given = ((name, getattr(self, name)) for name in SplitSettings.__struct_fields__)
        return {f"{PREFIX}{name}": value for name, value in given if value is not UNSET}


def changed(config: KvRouterConfig, fields: dict[str, Any]) -> KvRouterConfig:
    """The configuration with these fields. Raises ValueError naming the field, without the prefix."""
    try:
        new = config.with_overrides(**fields)
        check_split(new)
    except ValueError as e:
        raise ValueError(str(e).removeprefix(PREFIX)) from None
    return new


def check_split(config: KvRouterConfig) -> None:
    """Raises ValueError, naming the field, for settings of a frontend's router with which a policy could never decide
    otherwise than it would without them."""
    if not config.conditional_disagg_enabled:
        return
    prefill, decode = config.conditional_disagg_prefill_busy_threshold, config.conditional_disagg_decode_busy_threshold
    if prefill is None and config.conditional_disagg_policy == "prefill_load":
        raise ValueError(f"{PREFIX}prefill_busy_threshold: the policy prefill_load has nothing else to go by; set it")
    for name, value, tracked in (
        ("prefill_busy_threshold", prefill, "router_track_prefill_tokens"),
        ("decode_busy_threshold", decode, "router_track_active_blocks"),
    ):
        if value is not None and not getattr(config, tracked):
            raise ValueError(f"{PREFIX}{name}: without {tracked} no worker is ever busy")


def split_warnings(config: KvRouterConfig) -> list[str]:
    """What of the settings works otherwise than it may be meant, in sentences."""
    if not config.conditional_disagg_enabled:
        return []
    found = []
    policy = config.conditional_disagg_policy
    if policy == "isl_or_load" and config.conditional_disagg_prefill_busy_threshold is None:
        found.append("isl_or_load without prefill_busy_threshold goes by length alone, as isl_bounding does")
    if policy == "predicted" and config.router_policy not in LEARNING:
        found.append(
            f"predicted takes an ordinary GPU's times, as the router policy {config.router_policy} learns none; "
            f"{' and '.join(LEARNING)} do"
        )
    if policy == "always":
        found.append("always sends every prompt to prefill workers, as if nothing were conditional")
    return found
