"""Which class of queue does a request wait in, and what holds for that class? [K42-K44]

Without a policy file there is one class, `default`, with the router's own threshold and order. A file (YAML, or JSON,
which is YAML too) names classes: each is of a family, which a request asks for, and of a bucket of uncached prompt
tokens, which its prompt falls into.

    default_policy_family: standard
    uncached_isl_buckets:
      - {min_tokens: 0, bucket: short}
      - {min_tokens: 4096, bucket: long}
    policy_classes:
      - {name: short, policy_family: standard, cache_bucket: short, quantum: 8192, prefill_busy_threshold_frac: 4}
      - {name: long, policy_family: standard, cache_bucket: long, quantum: 4096, prefill_busy_threshold_frac: 2}
    worker_selection:
      - {name: gentle, parameters: {overlap_score_credit: 0.5}}
"""

import difflib
from bisect import bisect_right
from pathlib import Path
from typing import Any

import msgspec

from dynamo.router.config import QUEUE_POLICIES, KvRouterConfig, RouterConfig

DEFAULT_CLASS = "default"
DEFAULT_QUANTUM = 8192  # uncached tokens a round: one step of an engine
DEFAULT_REQUEST_LIMIT = 1024  # queued requests a worker; with 10,000 tokens each this is minutes of work, and 100 MB
MAX_FILE_BYTES = 1 << 20  # a policy file is a screenful


class PolicyClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One queue. A worker is busy for it with more queued prompt tokens than either threshold says; None: never.

    `prefill_busy_threshold_frac` is in multiples of the worker's max_num_batched_tokens, `quantum` the uncached tokens
    it may send in a round in which others wait too. Limits are for each worker; None: no limit.
    """

    name: str = DEFAULT_CLASS
    policy_family: str = DEFAULT_CLASS
    cache_bucket: str = "all"
    queue_policy: str = "fcfs"
    quantum: int = DEFAULT_QUANTUM
    prefill_busy_threshold: int | None = None
    prefill_busy_threshold_frac: float | None = None
    request_queue_limit_per_worker: int | None = DEFAULT_REQUEST_LIMIT
    raw_isl_token_queue_limit_per_worker: int | None = None
    cached_token_queue_limit_per_worker: int | None = None

    def __post_init__(self) -> None:
        if self.queue_policy not in QUEUE_POLICIES:
            raise ValueError(f"queue_policy must be one of {', '.join(QUEUE_POLICIES)}, got {self.queue_policy!r}")
        if self.quantum < 1:
            raise ValueError(f"quantum must be at least 1 token, got {self.quantum}")
        for name in ("prefill_busy_threshold", "prefill_busy_threshold_frac"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        for name in (
            "request_queue_limit_per_worker",
            "raw_isl_token_queue_limit_per_worker",
            "cached_token_queue_limit_per_worker",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")

    @property
    def queues(self) -> bool:
        """Whether requests of this class ever wait."""
        return self.prefill_busy_threshold is not None or self.prefill_busy_threshold_frac is not None

    def bound(self, max_batched_tokens: int) -> float:
        """The most queued prompt tokens with which a worker is not busy yet."""
        bound = float("inf")
        if self.prefill_busy_threshold is not None:
            bound = self.prefill_busy_threshold
        if self.prefill_busy_threshold_frac is not None:
            bound = min(bound, self.prefill_busy_threshold_frac * max_batched_tokens)
        return bound


class _Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    min_tokens: int
    bucket: str


class WorkerSelection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the choice under a name, which `router_prefill_policy` and `router_decode_policy` refer to."""

    name: str
    parameters: dict[str, float] = {}
    type: str | None = None
    """A policy of `dynamo.router.policies`; None for the configured one."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default_policy_family: str | None = None
    uncached_isl_buckets: list[_Bucket] = []
    policy_classes: list[PolicyClass] = []
    worker_selection: list[WorkerSelection] = []
    router: dict[str, Any] = {}


SELECTION_PARAMETERS = (
    "overlap_score_credit",
    "overlap_score_credit_decay",
    "prefill_load_scale",
    "decode_active_request_weight",
    "router_temperature",
)


class QueueProfile:
    """The classes there are. `settings` are those of the router that the file changes."""

    def __init__(
        self,
        classes: list[PolicyClass],
        default_family: str,
        buckets: list[tuple[int, str]],
        settings: dict[str, Any] | None = None,
        selections: dict[str, WorkerSelection] | None = None,
    ) -> None:
        self.classes = classes
        self.default_family = default_family
        self.settings = settings or {}
        self.selections = selections or {}
        self._by_place = {(each.policy_family, each.cache_bucket): each for each in classes}
        self._families = {each.policy_family for each in classes}
        self._starts = [start for start, _ in buckets]
        self._buckets = [name for _, name in buckets]

    @property
    def queues(self) -> bool:
        """Whether any request ever waits."""
        return any(each.queues for each in self.classes)

    def classify(self, family: str | None, uncached_tokens: int) -> PolicyClass:
        """The class of a request. A family nobody named is the default one, so that clients cannot make classes."""
        known = family if family in self._families and family is not None else self.default_family
        bucket = self._buckets[bisect_right(self._starts, uncached_tokens) - 1]
        return self._by_place[known, bucket]

    @classmethod
    def simple(cls, config: KvRouterConfig) -> "QueueProfile":
        """One class, of the router's own settings."""
        default = PolicyClass(
            queue_policy=config.router_queue_policy, prefill_busy_threshold_frac=config.router_queue_threshold
        )
        return cls([default], DEFAULT_CLASS, [(0, "all")])


def load_profile(config: KvRouterConfig) -> QueueProfile:
    """The profile that the configuration asks for.

    Raises:
        ValueError: the policy file cannot be read, or says what cannot be meant; names the file and the field.
    """
    if config.router_policy_config is None:
        return QueueProfile.simple(config)
    path = Path(config.router_policy_config)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has over {MAX_FILE_BYTES} bytes")
        return parse_profile(path.read_bytes())
    except OSError as e:
        raise ValueError(f"router_policy_config: {path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise ValueError(f"router_policy_config: {path}: {e}") from None


def parse_profile(text: bytes) -> QueueProfile:
    """Read a policy file. Raises ValueError naming the field."""
    import yaml  # a fifth of a second to import, and few routers have a file

    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"it is not YAML: {e}") from None
    if not isinstance(raw, dict):
        raise ValueError("it must be a mapping with policy_classes")  # noqa: TRY004 - a wrong value, not a wrong call
    _check_names(raw)
    try:
        file = msgspec.convert(raw, _File)
    except msgspec.ValidationError as e:
        raise ValueError(str(e)) from None
    return _check(file)


def _check_names(raw: dict[str, Any]) -> None:
    """Point at the nearest right word, which the decoder does not."""
    for where, names, struct in (
        ("", raw.keys(), _File),
        *(
            (f"policy_classes[{i}].", each.keys(), PolicyClass)
            for i, each in enumerate(raw.get("policy_classes") or ())
            if isinstance(each, dict)
        ),
    ):
        for name in names:
            if name not in struct.__struct_fields__:
                near = difflib.get_close_matches(str(name), struct.__struct_fields__, n=1)
                raise ValueError(f"{where}{name} is not known" + (f"; did you mean {near[0]}?" if near else ""))


def _check(file: _File) -> QueueProfile:
    classes = file.policy_classes or [PolicyClass()]
    names = [each.name for each in classes]
    if len(set(names)) != len(names):
        raise ValueError(f"policy_classes: the name {max(names, key=names.count)!r} is given twice")
    buckets = [(each.min_tokens, each.bucket) for each in file.uncached_isl_buckets] or [(0, "all")]
    if buckets[0][0] != 0 or buckets != sorted(set(buckets)):
        raise ValueError("uncached_isl_buckets: min_tokens must start at 0 and rise")
    known = {bucket for _, bucket in buckets}
    families = list(dict.fromkeys(each.policy_family for each in classes))
    default = file.default_policy_family or families[0]
    if default not in families:
        raise ValueError(f"default_policy_family: {default!r} is the family of no class; there are {families}")
    places = [(each.policy_family, each.cache_bucket) for each in classes]
    for family, bucket in places:
        if bucket not in known:
            raise ValueError(f"policy_classes: cache_bucket {bucket!r} is not among the buckets {sorted(known)}")
        if places.count((family, bucket)) > 1:
            raise ValueError(f"policy_classes: two classes of family {family!r} have the bucket {bucket!r}")
    for family in families:
        for bucket in sorted(known):
            if (family, bucket) not in places:
                raise ValueError(f"policy_classes: family {family!r} has no class for the bucket {bucket!r}")
    return QueueProfile(classes, default, buckets, _settings(file.router), _selections(file.worker_selection))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in KvRouterConfig.__struct_fields__ or name == "router_policy_config":
            raise ValueError(f"router.{name} is not a setting of the KV router")
    return given


def _selections(given: list[WorkerSelection]) -> dict[str, WorkerSelection]:
    for each in given:
        for name in each.parameters:
            if name not in SELECTION_PARAMETERS:
                allowed = ", ".join(SELECTION_PARAMETERS)
                raise ValueError(f"worker_selection {each.name!r}: {name} is not one of {allowed}")
    return {each.name: each for each in given}


def configure(config: KvRouterConfig, profile: QueueProfile, selection: str | None) -> KvRouterConfig:
    """The configuration with what the policy file changes, and the named worker selection, if one is named.

    Raises:
        ValueError: no selection has that name, or a value cannot be meant.
    """
    changes = dict(profile.settings)
    if selection is not None:
        chosen = profile.selections.get(selection)
        if chosen is None:
            raise ValueError(
                f"worker_selection: there is none named {selection!r} in the policy file; "
                f"it has {sorted(profile.selections) or 'none'}"
            )
        changes |= chosen.parameters
        if chosen.type is not None:
            changes["router_policy"] = chosen.type
    try:
        return msgspec.convert({**msgspec.structs.asdict(config), **changes}, KvRouterConfig) if changes else config
    except msgspec.ValidationError as e:
        raise ValueError(f"router settings of the policy file: {e}") from None


def effective(routing: RouterConfig) -> KvRouterConfig:
    """The settings of a router of workers that answer, with its policy file's. Raises ValueError as the others."""
    config = routing.config or KvRouterConfig()
    return configure(config, load_profile(config), config.router_decode_policy)
