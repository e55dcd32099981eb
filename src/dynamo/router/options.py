"""Which flags and variables set a KV router, and what do they say? One table, for every program that has a router."""

import argparse
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from dynamo.router.config import (
    DEFAULT_POLICY,
    QUEUE_POLICIES,
    SPLIT_POLICIES,
    KvRouterConfig,
    RouterConfig,
    refuse_split,
)
from dynamo.router.policies import POLICIES
from dynamo.router.queue import TIMEOUT_S
from dynamo.router.queue_profile import effective
from dynamo.router.split_settings import PREFIX, SplitSettings, check_split
from dynamo.runtime.options import OptionParser, env_number
from dynamo.runtime.selection import RouterMode

SPLITS = "conditional_disagg_enabled"
SPLIT_CONFIG = "--router-conditional-disagg-config"


def _maybe(number: Callable[[str], Any]) -> Callable[[str], Any]:
    """A number, or the word None for none."""

    def convert(text: str) -> Any:
        return None if text.strip().lower() in ("none", "") else number(text)

    convert.__name__ = number.__name__  # argparse names it in its message
    return convert


class _Option(NamedTuple):
    """A flag, its older names, its variable, the field it sets, and what its value is."""

    flags: tuple[str, ...]
    env: str
    field: str
    type: Callable[[str], Any]
    help: str = argparse.SUPPRESS
    more: Mapping[str, Any] = MappingProxyType({})


def _kv(flag: str, env: str, field: str, kind: Any, text: str = argparse.SUPPRESS, *old: str, **more: Any) -> _Option:
    return _Option((flag, *old), env, field, kind, text, more)


_KV: Final = (
    _kv(
        "--router-policy",
        "DYN_ROUTER_POLICY",
        "router_policy",
        str,
        f"which cost decides: {', '.join(sorted(POLICIES))}",
        choices=tuple(sorted(POLICIES)),
        metavar="NAME",
    ),
    _kv(
        "--router-kv-events",
        "DYN_ROUTER_USE_KV_EVENTS",
        "use_kv_events",
        bool,
        "know workers' caches by their events; without, guess from what was sent to each",
        "--kv-events",
    ),
    _kv(
        "--router-ttl-secs",
        "DYN_ROUTER_TTL_SECS",
        "router_ttl_secs",
        float,
        "without events: seconds that a sent prefix is taken to be cached",
        metavar="S",
    ),
    _kv(
        "--router-approximate-cache-policy",
        "DYN_ROUTER_APPROXIMATE_CACHE_POLICY",
        "router_approximate_cache_policy",
        str,
        "without events: forget by age (ttl), or by the worker's room (lru)",
        choices=("ttl", "lru"),
        metavar="NAME",
    ),
    _kv(
        "--router-predicted-ttl-secs",
        "DYN_ROUTER_PREDICTED_TTL_SECS",
        "router_predicted_ttl_secs",
        _maybe(float),
        "with events: a prefix counts for so long from when it is sent, before the worker tells",
        metavar="S",
    ),
    _kv(
        "--router-temperature",
        "DYN_ROUTER_TEMPERATURE",
        "router_temperature",
        float,
        "0: the lowest cost wins; above: drawn by cost, the more evenly the higher",
        metavar="T",
    ),
    _kv(
        "--router-kv-overlap-score-credit",
        "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
        "overlap_score_credit",
        float,
        "linear: worth of a block cached on the device",
        "--kv-overlap-score-weight",
        metavar="W",
    ),
    _kv(
        "--router-kv-overlap-score-credit-decay",
        "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY",
        "overlap_score_credit_decay",
        float,
        "linear: how fast that worth falls at a worker with a longer queue than others",
        metavar="W",
    ),
    _kv(
        "--router-host-cache-hit-weight",
        "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT",
        "host_cache_hit_weight",
        float,
        "linear: worth of a block cached in host memory",
        metavar="W",
    ),
    _kv(
        "--router-disk-cache-hit-weight",
        "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT",
        "disk_cache_hit_weight",
        float,
        "linear: worth of a block cached on disk",
        metavar="W",
    ),
    _kv(
        "--router-prefill-load-scale",
        "DYN_ROUTER_PREFILL_LOAD_SCALE",
        "prefill_load_scale",
        float,
        "linear: weight of prompt blocks to compute",
        metavar="W",
    ),
    _kv(
        "--router-decode-active-request-weight",
        "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
        "decode_active_request_weight",
        float,
        "linear: blocks that each active request counts as, beside those it holds",
        metavar="W",
    ),
    _kv(
        "--router-track-active-blocks",
        "DYN_ROUTER_TRACK_ACTIVE_BLOCKS",
        "router_track_active_blocks",
        bool,
        "count the KV blocks of running requests",
        "--track-active-blocks",
    ),
    _kv(
        "--router-track-output-blocks",
        "DYN_ROUTER_TRACK_OUTPUT_BLOCKS",
        "router_track_output_blocks",
        bool,
        "count the blocks that answers fill too",
        "--track-output-blocks",
    ),
    _kv(
        "--router-track-prefill-tokens",
        "DYN_ROUTER_TRACK_PREFILL_TOKENS",
        "router_track_prefill_tokens",
        bool,
        "count prompt tokens that are not computed yet",
    ),
    _kv(
        "--router-assume-kv-reuse",
        "DYN_ROUTER_ASSUME_KV_REUSE",
        "router_assume_kv_reuse",
        bool,
        "running requests share the blocks of equal prefixes",
        "--assume-kv-reuse",
    ),
    _kv(
        "--router-replica-sync",
        "DYN_ROUTER_REPLICA_SYNC",
        "router_replica_sync",
        bool,
        "tell other routers of the same workers what is sent where, and hear them",
    ),
    _kv(
        "--router-queue-threshold",
        "DYN_ROUTER_QUEUE_THRESHOLD",
        "router_queue_threshold",
        _maybe(float),
        "let requests wait here while every worker has more prompt tokens queued than so many times its "
        "max_num_batched_tokens",
        metavar="F",
    ),
    _kv(
        "--router-queue-policy",
        "DYN_ROUTER_QUEUE_POLICY",
        "router_queue_policy",
        str,
        f"who goes first from that queue: {', '.join(QUEUE_POLICIES)}",
        choices=QUEUE_POLICIES,
        metavar="NAME",
    ),
    _kv(
        "--router-policy-config",
        "DYN_ROUTER_POLICY_CONFIG",
        "router_policy_config",
        str,
        "YAML file with classes of the queue and settings of the choice",
        metavar="FILE",
    ),
    _kv(
        "--router-decode-policy",
        "DYN_ROUTER_DECODE_POLICY",
        "router_decode_policy",
        str,
        "entry of that file's worker_selection to choose by",
        metavar="NAME",
    ),
    _kv(
        "--router-prefill-policy",
        "DYN_ROUTER_PREFILL_POLICY",
        "router_prefill_policy",
        str,
        "the same for workers that only compute prompts",
        metavar="NAME",
    ),
    _kv(
        "--router-conditional-disagg",
        "DYN_ROUTER_CONDITIONAL_DISAGG",
        SPLITS,
        bool,
        "with prefill workers: let decode workers compute the prompts that are not worth sending away",
    ),
    # Taken because command lines have it; one thread keeps the index, at over a million blocks a second.
    _kv("--router-event-threads", "DYN_ROUTER_EVENT_THREADS", "router_event_threads", int),
    # Features that are not here: taken at the value that asks for nothing, and refused by name at any other.
    _kv("--router-tracking-hash", "DYN_ROUTER_TRACKING_HASH", "router_tracking_hash", str),
    _kv("--router-tracking-key-file", "DYN_ROUTER_TRACKING_KEY_FILE", "router_tracking_key_file", str),
    _kv("--router-tracking-key-id", "DYN_ROUTER_TRACKING_KEY_ID", "router_tracking_key_id", str),
    _kv("--router-prefill-load-model", "DYN_ROUTER_PREFILL_LOAD_MODEL", "router_prefill_load_model", str),
    _kv("--use-remote-indexer", "DYN_USE_REMOTE_INDEXER", "use_remote_indexer", bool),
    _kv("--serve-indexer", "DYN_SERVE_INDEXER", "serve_indexer", bool),
    _kv("--enable-session-prefix-index", "DYN_ENABLE_SESSION_PREFIX_INDEX", "enable_session_prefix_index", bool),
    _kv("--shared-cache-multiplier", "DYN_SHARED_CACHE_MULTIPLIER", "shared_cache_multiplier", _maybe(float)),
    _kv("--shared-cache-type", "DYN_SHARED_CACHE_TYPE", "shared_cache_type", str),
)

_AROUND: Final = (
    _kv(
        "--active-decode-blocks-threshold",
        "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
        "active_decode_blocks_threshold",
        _maybe(float),
        "a worker is busy with more than this share (0 to 1) of its KV blocks in use; all busy: 529",
        metavar="F",
    ),
    _kv(
        "--active-prefill-tokens-threshold",
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
        "active_prefill_tokens_threshold",
        _maybe(int),
        "or with more prompt tokens than this to compute",
        metavar="N",
    ),
    _kv(
        "--active-prefill-tokens-threshold-frac",
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
        "active_prefill_tokens_threshold_frac",
        _maybe(float),
        "or with more than so many times its max_num_batched_tokens",
        metavar="F",
    ),
    _kv(
        "--router-session-affinity-ttl-secs",
        "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
        "session_affinity_ttl_secs",
        _maybe(int),
        "keep a session (header x-dynamo-session-id) at one worker until it was idle for so long",
        metavar="S",
    ),
    _kv(
        "--router-session-affinity-mode",
        "DYN_ROUTER_SESSION_AFFINITY_MODE",
        "session_affinity_mode",
        str,
        "hard: always there; soft: elsewhere while that worker is full",
        choices=("hard", "soft"),
        metavar="NAME",
    ),
    # Deprecated where it comes from: roles follow from the workers that register.
    _kv("--enforce-disagg", "DYN_ENFORCE_DISAGG", "enforce_disagg", bool),
)

_LOAD_AWARE: Final = {
    "overlap_score_credit": 0.0,
    "host_cache_hit_weight": 0.0,
    "disk_cache_hit_weight": 0.0,
    "use_kv_events": False,
    "router_assume_kv_reuse": False,
    "router_track_active_blocks": True,
    "router_track_prefill_tokens": True,
}
"""What `--load-aware` stands for [K36]."""


def add_router_options(p: OptionParser, *, splits: bool = False) -> None:
    """Add every flag of a KV router, in two groups. Those that split prompts are only shown of a program that does."""
    kv = p.add_argument_group("KV routing (--router-mode kv)")
    around = p.add_argument_group("overload and sessions (--router-mode kv)")
    for group, options, defaults in ((kv, _KV, KvRouterConfig()), (around, _AROUND, RouterConfig())):
        for each in options:
            p.option(
                group,
                *each.flags,
                env=each.env,
                dest=each.field,
                default=getattr(defaults, each.field),
                type=each.type,
                help=each.help if splits or each.field != SPLITS else argparse.SUPPRESS,
                **each.more,
            )
    p.option(
        kv,
        "--load-aware",
        env="DYN_ROUTER_LOAD_AWARE",
        dest="load_aware",
        default=False,
        type=bool,
        help="short for --router-mode kv by load alone, with no regard to caches",
    )
    p.option(
        kv,
        SPLIT_CONFIG,
        env="DYN_ROUTER_CONDITIONAL_DISAGG_CONFIG",
        dest="conditional_disagg_config",
        metavar="JSON",
        help=f"which prompts --router-conditional-disagg keeps: policy ({', '.join(SPLIT_POLICIES)}), "
        "eff_isl_threshold, eff_isl_ratio_threshold, prefill_busy_threshold, decode_busy_threshold"
        if splits
        else argparse.SUPPRESS,
    )


def router_config(given: dict[str, Any], mode: RouterMode, *, splits: bool = False) -> RouterConfig:
    """Take the options of `add_router_options` out of `given`, and make them a configuration.

    A weight of the linear cost means that cost, where no policy is named. `splits` says whether the program has both
    pools before it, of those who compute prompts and of those who answer.

    Raises:
        ValueError: naming the flag, the variable, or what is wrong in the policy file.
    """
    kv = {each.field: given.pop(each.field) for each in _KV}
    around = {each.field: given.pop(each.field) for each in _AROUND}
    if given.pop("load_aware"):
        kv |= _LOAD_AWARE
        mode = RouterMode.KV
    kv |= _split(given.pop("conditional_disagg_config"), enabled=kv[SPLITS])
    try:
        config = KvRouterConfig(**kv)
        unread = config.unread_settings()
        if unread and config.router_policy == DEFAULT_POLICY:
            config = config.with_overrides(router_policy="linear")
        elif unread:
            raise ValueError(f"{unread[0]}: the policy {config.router_policy} has no such weight; linear has")
        router = RouterConfig(mode=mode, config=config, **around)
        in_effect = effective(router)
        if not splits:
            refuse_split(in_effect, "this program")
        elif in_effect.conditional_disagg_enabled and mode is not RouterMode.KV:
            raise ValueError(f"{SPLITS}: needs --router-mode kv, which knows caches and loads; not {mode.value}")
        check_split(in_effect)
    except ValueError as e:
        raise ValueError(_with_flag(str(e))) from None
    _check_environment()
    return router


def _split(text: str | None, *, enabled: bool) -> dict[str, Any]:
    """The fields that the JSON sets. Raises ValueError as `router_config`."""
    if text is None:
        return {}
    if not enabled:
        raise ValueError(f"{SPLIT_CONFIG}: has no effect without --router-conditional-disagg")
    try:
        return SplitSettings.from_json(text).fields()
    except ValueError as e:
        raise ValueError(f"{SPLIT_CONFIG}: {e}") from None


def _check_environment() -> None:
    """What a router reads when it begins must not be found wrong only then."""
    for name, least, default in (
        ("DYN_ROUTER_QUEUE_TIMEOUT_SECS", 1e-3, TIMEOUT_S),
        ("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS", 1e-3, 1.0),
        ("DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS", 0.0, 0.0),
    ):
        value = env_number(name, default)
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least:g} seconds, got {value:g}")


def options_without_effect(config: RouterConfig) -> list[str]:
    """The flags that were set, of a router that does not look at them because its mode is another."""
    if config.mode is RouterMode.KV:
        return []
    chosen: tuple[tuple[tuple[_Option, ...], Any, Any], ...] = (
        (_KV, config.config or KvRouterConfig(), KvRouterConfig()),
        (_AROUND, config, RouterConfig()),
    )
    return [
        each.flags[0]
        for options, given, default in chosen
        for each in options
        if each.field != "router_event_threads" and getattr(given, each.field) != getattr(default, each.field)
    ]


def _with_flag(message: str) -> str:
    """The message with the flag in place of the field that it begins with."""
    for each in (*_KV, *_AROUND):
        if message.startswith(each.field) and not message[len(each.field) :][:1].isidentifier():
            return each.flags[0] + message[len(each.field) :]
    if message.startswith(PREFIX):
        return f"{SPLIT_CONFIG}: {message.removeprefix(PREFIX)}"
    return message
