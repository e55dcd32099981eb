"""How is a router told to behave? The names and defaults are those its users know (facts §2.2).

Raises ValueError, naming the field, for a value that cannot be meant.
"""

from typing import Any

import msgspec

from dynamo.runtime.selection import RouterMode

DEFAULT_POLICY = "linear"
MAX_AFFINITY_TTL_SECS = 31_536_000  # a year, the bound users know [K46]


class KvRouterConfig(msgspec.Struct, frozen=True):
    """The KV router's settings. Weights are per block of the worker's block size."""

    overlap_score_weight: float | None = None
    """The old name of `overlap_score_credit`; wins over it where given."""
    host_cache_hit_weight: float = 0.75
    disk_cache_hit_weight: float = 0.25
    router_temperature: float = 0.0
    use_kv_events: bool = True
    router_replica_sync: bool = False
    router_track_active_blocks: bool = True
    router_track_output_blocks: bool = False
    router_assume_kv_reuse: bool = True
    router_track_prefill_tokens: bool = True
    router_ttl_secs: float = 120.0
    router_approximate_cache_policy: str = "ttl"
    router_queue_threshold: float | None = None
    router_queue_policy: str = "fcfs"
    router_predicted_ttl_secs: float | None = None
    overlap_score_credit: float = 1.0
    overlap_score_credit_decay: float = 0.0
    prefill_load_scale: float = 1.0
    decode_active_request_weight: float = 0.0
    router_policy_config: str | None = None
    router_policy: str = DEFAULT_POLICY
    """Which cost decides: a name of `dynamo.router.policies`."""
    active_request_expiry_secs: float = 300.0
    """A booking that nobody freed for so long is a leak and is dropped [K29]."""

    def __post_init__(self) -> None:
        for name in (
            "host_cache_hit_weight",
            "disk_cache_hit_weight",
            "router_temperature",
            "overlap_score_credit",
            "overlap_score_credit_decay",
            "prefill_load_scale",
            "decode_active_request_weight",
        ):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if self.router_ttl_secs <= 0:
            raise ValueError(f"router_ttl_secs must be above 0, got {self.router_ttl_secs!r}")
        if self.router_approximate_cache_policy not in ("ttl", "lru"):
            raise ValueError(
                f"router_approximate_cache_policy must be ttl or lru, got {self.router_approximate_cache_policy!r}"
            )
        if self.router_queue_policy not in ("fcfs", "wspt", "lcfs"):
            raise ValueError(f"router_queue_policy must be fcfs, wspt or lcfs, got {self.router_queue_policy!r}")

    @property
    def credit(self) -> float:
        """What a cached block on the device is worth, in blocks of prefill."""
        return self.overlap_score_credit if self.overlap_score_weight is None else self.overlap_score_weight

    @classmethod
    def from_json(cls, text: str) -> "KvRouterConfig":
        """From a JSON object of these fields. Raises ValueError naming what is wrong."""
        try:
            return msgspec.json.decode(text.encode(), type=cls)
        except msgspec.ValidationError as e:
            raise ValueError(f"KvRouterConfig: {e}") from None

    def copy(self) -> "KvRouterConfig":
        """The same settings; they never change, so this is the object itself."""
        return self

    def with_overrides(self, **changes: Any) -> "KvRouterConfig":
        """The same settings but for `changes`. Raises TypeError for an unknown name."""
        return msgspec.structs.replace(self, **changes)


class LoadThresholdConfig(msgspec.Struct, frozen=True):
    """When a worker counts as busy [K45]; None switches a test off.

    `active_decode_blocks_threshold` is a share of the worker's blocks, 0 to 1; `active_prefill_tokens_threshold` a
    number of tokens; its `_frac` form a multiple of the worker's max_num_batched_tokens.
    """

    active_decode_blocks_threshold: float | None = None
    active_prefill_tokens_threshold: int | None = None
    active_prefill_tokens_threshold_frac: float | None = None

    def __post_init__(self) -> None:
        share = self.active_decode_blocks_threshold
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"active_decode_blocks_threshold must be between 0 and 1, got {share!r}")
        for name in ("active_prefill_tokens_threshold", "active_prefill_tokens_threshold_frac"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")

    @property
    def off(self) -> bool:
        """Whether no worker ever counts as busy."""
        return (
            self.active_decode_blocks_threshold is None
            and self.active_prefill_tokens_threshold is None
            and self.active_prefill_tokens_threshold_frac is None
        )


class RouterConfig(msgspec.Struct, frozen=True):
    """How requests of one model are routed."""

    mode: RouterMode = RouterMode.RoundRobin
    config: KvRouterConfig | None = None
    active_decode_blocks_threshold: float | None = None
    active_prefill_tokens_threshold: int | None = None
    active_prefill_tokens_threshold_frac: float | None = None
    enforce_disagg: bool = False
    session_affinity_ttl_secs: int | None = None
    session_affinity_mode: str = "hard"

    def __post_init__(self) -> None:
        ttl = self.session_affinity_ttl_secs
        if ttl is not None and not 1 <= ttl <= MAX_AFFINITY_TTL_SECS:
            raise ValueError(f"session_affinity_ttl_secs must be between 1 and {MAX_AFFINITY_TTL_SECS}, got {ttl!r}")
        if self.session_affinity_mode not in ("hard", "soft"):
            raise ValueError(f"session_affinity_mode must be hard or soft, got {self.session_affinity_mode!r}")

    @property
    def thresholds(self) -> LoadThresholdConfig:
        """The load thresholds among these settings."""
        return LoadThresholdConfig(
            active_decode_blocks_threshold=self.active_decode_blocks_threshold,
            active_prefill_tokens_threshold=self.active_prefill_tokens_threshold,
            active_prefill_tokens_threshold_frac=self.active_prefill_tokens_threshold_frac,
        )
