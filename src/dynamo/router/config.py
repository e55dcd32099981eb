"""How is a router told to behave? The names and defaults are those its users know (facts §2.2).

Raises ValueError, naming the field, for a value that cannot be meant.
"""

import math
from typing import Any

import msgspec

from dynamo.runtime.selection import RouterMode

DEFAULT_POLICY = "marginal"  # the best on traces, see docs/explanation/routing.md
QUEUE_POLICIES = ("fcfs", "lcfs", "wspt")
SPLIT_POLICIES = ("always", "isl_bounding", "prefill_load", "isl_or_load", "predicted")  # of dynamo.router.split
_ONLY = {
    "router_prefill_load_model": "none",
    "use_remote_indexer": False,
    "serve_indexer": False,
    "enable_session_prefix_index": False,
    "shared_cache_multiplier": None,
    "shared_cache_type": "none",
    "router_tracking_hash": "public-xxh3-v1",
    "router_tracking_key_file": None,
    "router_tracking_key_id": None,
}
"""Settings that users know whose features are not here: asking for one is an error, never silently without effect."""

LINEAR_WEIGHTS = {
    "overlap_score_weight": None,
    "overlap_score_credit": 1.0,
    "overlap_score_credit_decay": 0.0,
    "host_cache_hit_weight": 0.75,
    "disk_cache_hit_weight": 0.25,
    "prefill_load_scale": 1.0,
    "decode_active_request_weight": 0.0,
}
"""Settings that only the linear cost has, and their defaults."""

MAX_AFFINITY_TTL_SECS = 31_536_000  # a year, the bound users know [K46]


class _CacheWeights(msgspec.Struct, frozen=True):
    """The settings that may be given by position, in the order that users know."""

    overlap_score_weight: float | None = None
    """The old name of `overlap_score_credit`; wins over it where given."""
    host_cache_hit_weight: float = 0.75
    disk_cache_hit_weight: float = 0.25
    router_temperature: float = 0.0
    use_kv_events: bool = True


class KvRouterConfig(_CacheWeights, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV router's settings. Weights are per block of the worker's block size."""

    router_replica_sync: bool = False
    router_track_active_blocks: bool = True
    router_track_output_blocks: bool = False
    router_assume_kv_reuse: bool = True
    router_track_prefill_tokens: bool = True
    router_prefill_load_model: str = "none"
    router_ttl_secs: float = 120.0
    router_approximate_cache_policy: str = "ttl"
    router_queue_threshold: float | None = None
    router_event_threads: int = 4
    """Taken and without effect: one thread keeps the index, at over a million blocks a second."""
    router_queue_policy: str = "fcfs"
    use_remote_indexer: bool = False
    serve_indexer: bool = False
    enable_session_prefix_index: bool = False
    shared_cache_multiplier: float | None = None
    shared_cache_type: str = "none"
    router_predicted_ttl_secs: float | None = None
    conditional_disagg_enabled: bool = False
    """Whether the frontend lets decode workers compute some prompts (`dynamo.router.split`)."""
    conditional_disagg_policy: str = "isl_bounding"
    conditional_disagg_eff_isl_threshold: int = 2048
    conditional_disagg_eff_isl_ratio_threshold: float = 0.7
    conditional_disagg_prefill_busy_threshold: float | None = None
    conditional_disagg_decode_busy_threshold: float | None = None
    overlap_score_credit: float = 1.0
    overlap_score_credit_decay: float = 0.0
    prefill_load_scale: float = 1.0
    decode_active_request_weight: float = 0.0
    router_policy_config: str | None = None
    router_prefill_policy: str | None = None
    router_decode_policy: str | None = None
    """Names of `worker_selection` entries in the policy file. Workers that do both parts go by the decode one."""
    router_tracking_hash: str = "public-xxh3-v1"
    router_tracking_key_file: str | None = None
    router_tracking_key_id: str | None = None
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
            "overlap_score_weight",
            "router_queue_threshold",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        for name in ("router_ttl_secs", "router_predicted_ttl_secs", "active_request_expiry_secs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if self.router_approximate_cache_policy not in ("ttl", "lru"):
            raise ValueError(
                f"router_approximate_cache_policy must be ttl or lru, got {self.router_approximate_cache_policy!r}"
            )
        if self.router_queue_policy not in QUEUE_POLICIES:
            raise ValueError(
                f"router_queue_policy must be one of {', '.join(QUEUE_POLICIES)}, got {self.router_queue_policy!r}"
            )
        self._check_split()
        for name, only in _ONLY.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name}: only {only!r} is in this version, not {getattr(self, name)!r}")
        if self.router_policy_config is None and (self.router_prefill_policy or self.router_decode_policy):
            raise ValueError(
                "router_prefill_policy, router_decode_policy: name entries of a file: set router_policy_config"
            )

    def _check_split(self) -> None:
        if self.conditional_disagg_policy not in SPLIT_POLICIES:
            raise ValueError(
                f"conditional_disagg_policy must be one of {', '.join(SPLIT_POLICIES)}, "
                f"got {self.conditional_disagg_policy!r}"
            )
        for name, most in (
            ("conditional_disagg_eff_isl_threshold", math.inf),
            ("conditional_disagg_eff_isl_ratio_threshold", 1),
            ("conditional_disagg_prefill_busy_threshold", math.inf),
            ("conditional_disagg_decode_busy_threshold", 1),
        ):
            value = getattr(self, name)
            if value is not None and not (0 <= value <= most and value < math.inf):
                bounds = "at least 0" if most == math.inf else f"between 0 and {most}"
                raise ValueError(f"{name} must be {bounds}, got {value!r}")

    @property
    def credit(self) -> float:
        """What a cached block on the device is worth, in blocks of prefill."""
        return self.overlap_score_credit if self.overlap_score_weight is None else self.overlap_score_weight

    def unread_settings(self) -> list[str]:
        """Weights that are set, and that the policy does not have."""
        if self.router_policy == "linear":
            return []
        return [name for name, default in LINEAR_WEIGHTS.items() if getattr(self, name) != default]

    @classmethod
    def from_json(cls, text: str) -> "KvRouterConfig":
        """From a JSON object of these fields. Raises ValueError naming what is wrong."""
        try:
            return msgspec.json.decode(text.encode(), type=cls)
        except msgspec.DecodeError as e:
            raise ValueError(f"KvRouterConfig: {e}") from None

    def copy(self) -> "KvRouterConfig":
        """The same settings; they never change, so this is the object itself."""
        return self

    def with_overrides(self, **changes: Any) -> "KvRouterConfig":
        """The same settings but for `changes`. Raises TypeError for an unknown name."""
        return msgspec.structs.replace(self, **changes)


def refuse_split(config: KvRouterConfig, who: str) -> None:
    """Raises ValueError if prompts are to be split by somebody who cannot: who routes to one pool of workers."""
    if config.conditional_disagg_enabled:
        raise ValueError(f"conditional_disagg_enabled: {who} routes to one pool of workers; only the frontend splits")


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
            if value is not None and not 0 <= value < float("inf"):
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
        _ = self.thresholds  # made to be checked
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
