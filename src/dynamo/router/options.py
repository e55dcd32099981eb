"""Which options does every program that routes by KV caches share?

`add_router_options` adds them to a program's parser, `router_config` reads them back. Options that users know whose
features are not here are known by name and refused: a router never runs without what was asked.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dynamo.router.config import DEFAULT_POLICY, QUEUE_POLICIES, KvRouterConfig, RouterConfig
from dynamo.router.policies import POLICIES
from dynamo.router.queue_profile import configure, load_profile
from dynamo.runtime.options import OptionParser
from dynamo.runtime.selection import RouterMode


class _Option(NamedTuple):
    flag: str
    env: str
    field: str
    """What it sets: a field of `KvRouterConfig`, or of `RouterConfig`."""
    type: Callable[[str], Any]
    help: str
    default: Any = None
    metavar: str | None = None
    choices: Sequence[str] | None = None
    old: str | None = None
    """A spelling that users know from before."""


_CACHE = (
    _Option(
        "--router-kv-events",
        "DYN_ROUTER_USE_KV_EVENTS",
        "use_kv_events",
        bool,
        "learn it from the workers' KV events, not from what is sent there",
        True,
        old="--kv-events",
    ),
    _Option(
        "--router-ttl-secs",
        "DYN_ROUTER_TTL_SECS",
        "router_ttl_secs",
        float,
        "without events: seconds that a block is taken to be there for",
        120.0,
        "SECS",
    ),
    _Option(
        "--router-approximate-cache-policy",
        "DYN_ROUTER_APPROXIMATE_CACHE_POLICY",
        "router_approximate_cache_policy",
        str,
        "without events: blocks go by age (ttl) or for want of room (lru)",
        "ttl",
        choices=("ttl", "lru"),
    ),
    _Option(
        "--router-predicted-ttl-secs",
        "DYN_ROUTER_PREDICTED_TTL_SECS",
        "router_predicted_ttl_secs",
        float,
        "with events: count what was just sent somewhere as held there for so long (unset: do not)",
        metavar="SECS",
    ),
    _Option(
        "--router-event-threads",
        "DYN_ROUTER_EVENT_THREADS",
        "router_event_threads",
        int,
        "taken and without effect: one thread keeps the index",
        4,
        "N",
    ),
)
_CHOICE = (
    _Option(
        "--router-policy",
        "DYN_ROUTER_POLICY",
        "router_policy",
        str,
        "the cost that decides: " + ", ".join(POLICIES),
        DEFAULT_POLICY,
        "NAME",
        tuple(POLICIES),
    ),
    _Option(
        "--router-kv-overlap-score-credit",
        "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
        "overlap_score_credit",
        float,
        "what a cached block on the device is worth, in blocks of prompt",
        1.0,
        "X",
    ),
    _Option(
        "--router-kv-overlap-score-credit-decay",
        "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY",
        "overlap_score_credit_decay",
        float,
        "how fast that goes down at a worker with more queued tokens than others",
        0.0,
        "X",
    ),
    _Option(
        "--router-host-cache-hit-weight",
        "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT",
        "host_cache_hit_weight",
        float,
        "what one in host memory is worth",
        0.75,
        "X",
    ),
    _Option(
        "--router-disk-cache-hit-weight",
        "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT",
        "disk_cache_hit_weight",
        float,
        "what one on disk is worth",
        0.25,
        "X",
    ),
    _Option(
        "--router-prefill-load-scale",
        "DYN_ROUTER_PREFILL_LOAD_SCALE",
        "prefill_load_scale",
        float,
        "weight of the prompt's part in the cost",
        1.0,
        "X",
    ),
    _Option(
        "--router-decode-active-request-weight",
        "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
        "decode_active_request_weight",
        float,
        "cost of each active request, in blocks",
        0.0,
        "X",
    ),
    _Option(
        "--router-temperature",
        "DYN_ROUTER_TEMPERATURE",
        "router_temperature",
        float,
        "above 0: draw by cost instead of taking the lowest",
        0.0,
        "X",
    ),
    _Option(
        "--load-aware",
        "DYN_ROUTER_LOAD_AWARE",
        "load_aware",
        bool,
        "by load alone: no events, no credit for cached blocks, no shared blocks",
        False,
    ),
    _Option(
        "--router-prefill-policy",
        "DYN_ROUTER_PREFILL_POLICY",
        "router_prefill_policy",
        str,
        "worker_selection of the policy file for prefill workers",
        metavar="NAME",
    ),
    _Option(
        "--router-decode-policy",
        "DYN_ROUTER_DECODE_POLICY",
        "router_decode_policy",
        str,
        "worker_selection of the policy file for all others",
        metavar="NAME",
    ),
)
_LOAD = (
    _Option(
        "--router-track-active-blocks",
        "DYN_ROUTER_TRACK_ACTIVE_BLOCKS",
        "router_track_active_blocks",
        bool,
        "count the KV blocks of active requests",
        True,
        old="--track-active-blocks",
    ),
    _Option(
        "--router-track-output-blocks",
        "DYN_ROUTER_TRACK_OUTPUT_BLOCKS",
        "router_track_output_blocks",
        bool,
        "count the blocks that they generate, too",
        False,
        old="--track-output-blocks",
    ),
    _Option(
        "--router-track-prefill-tokens",
        "DYN_ROUTER_TRACK_PREFILL_TOKENS",
        "router_track_prefill_tokens",
        bool,
        "count the prompt tokens that are not computed yet",
        True,
    ),
    _Option(
        "--router-assume-kv-reuse",
        "DYN_ROUTER_ASSUME_KV_REUSE",
        "router_assume_kv_reuse",
        bool,
        "count a block that several active requests have once",
        True,
        old="--assume-kv-reuse",
    ),
    _Option(
        "--router-active-request-expiry-secs",
        "DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS",
        "active_request_expiry_secs",
        float,
        "forget a request that nobody ended after so long",
        300.0,
        "SECS",
    ),
)
_REPLICA_SYNC = _Option(
    "--router-replica-sync",
    "DYN_ROUTER_REPLICA_SYNC",
    "router_replica_sync",
    bool,
    "tell the other routers of the same workers what is sent where",
    False,
)
_LIMITS = (
    _Option(
        "--router-queue-threshold",
        "DYN_ROUTER_QUEUE_THRESHOLD",
        "router_queue_threshold",
        float,
        "wait while every worker has more queued prompt tokens than this multiple of a step (unset: never)",
        metavar="X",
    ),
    _Option(
        "--router-queue-policy",
        "DYN_ROUTER_QUEUE_POLICY",
        "router_queue_policy",
        str,
        "who goes first",
        "fcfs",
        choices=QUEUE_POLICIES,
    ),
    _Option(
        "--router-policy-config",
        "DYN_ROUTER_POLICY_CONFIG",
        "router_policy_config",
        str,
        "YAML file of queue classes and worker selections",
        metavar="FILE",
    ),
    _Option(
        "--active-decode-blocks-threshold",
        "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
        "active_decode_blocks_threshold",
        float,
        "a worker is busy above this share of its KV blocks, 0 to 1 (unset: off)",
        metavar="X",
    ),
    _Option(
        "--active-prefill-tokens-threshold",
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
        "active_prefill_tokens_threshold",
        int,
        "a worker is busy above so many queued prompt tokens (unset: off)",
        metavar="N",
    ),
    _Option(
        "--active-prefill-tokens-threshold-frac",
        "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
        "active_prefill_tokens_threshold_frac",
        float,
        "the same in multiples of max_num_batched_tokens (unset: off)",
        metavar="X",
    ),
)
_AFFINITY = (
    _Option(
        "--router-session-affinity-ttl-secs",
        "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
        "session_affinity_ttl_secs",
        int,
        "keep a session at its worker until it was idle for so long (unset: do not)",
        metavar="SECS",
        old="--session-affinity-ttl-secs",
    ),
    _Option(
        "--router-session-affinity-mode",
        "DYN_ROUTER_SESSION_AFFINITY_MODE",
        "session_affinity_mode",
        str,
        "hard: always; soft: not while that worker is busy",
        "hard",
        choices=("hard", "soft"),
    ),
)
_ABSENT = {
    "--serve-indexer": "serving the index over the request plane is not in this version; see python -m dynamo.indexer",
    "--use-remote-indexer": "an index in another process is not in this version",
    "--enable-session-prefix-index": "the session prefix index is not in this version",
    "--shared-cache-type": "a cache shared by all workers is not in this version",
    "--shared-cache-multiplier": "a cache shared by all workers is not in this version",
    "--router-prefill-load-model": "prefill times from a profile are not here; see --router-policy predicted",
    "--router-tracking-hash": "keyed tracking hashes are not in this version",
    "--router-tracking-key-file": "keyed tracking hashes are not in this version",
    "--router-tracking-key-id": "keyed tracking hashes are not in this version",
    "--router-conditional-disagg": "separate prefill and decode workers are not in this version",
    "--router-conditional-disagg-config": "separate prefill and decode workers are not in this version",
}
_OFF = {"none", "public-xxh3-v1", "false", "0"}  # values of absent options that ask for nothing
_LOAD_AWARE = {"overlap_score_credit": 0.0, "use_kv_events": False, "router_assume_kv_reuse": False}


def add_router_options(parser: OptionParser, *, replica_sync: bool = True) -> None:
    """Add the options of `KvRouterConfig` and `RouterConfig`, in groups whose names begin with "router".

    `replica_sync` is for programs whose routers find each other through discovery.
    """
    for title, options in (
        ("router: what workers hold", _CACHE),
        ("router: which worker", _CHOICE),
        ("router: how busy workers are", (*_LOAD, _REPLICA_SYNC) if replica_sync else _LOAD),
        ("router: when all are busy", _LIMITS),
        ("router: sessions", _AFFINITY),
    ):
        group = parser.add_argument_group(title)
        for option in options:
            flags = [option.flag, option.old] if option.old else [option.flag]
            more = {} if option.type is bool else {"metavar": option.metavar, "choices": option.choices}
            parser.option(
                group,
                *flags,
                env=option.env,
                type=option.type,
                default=option.default,
                help=option.help,
                dest=option.field,
                **more,
            )
    for flag, why in _ABSENT.items():
        _refuse(parser, flag, why)


def _refuse(parser: OptionParser, flag: str, why: str) -> None:
    class Refuse(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: str | Sequence[Any] | None,
            option_string: str | None = None,
        ) -> None:
            if values is None or str(values) not in _OFF:
                parser.error(f"{flag}: {why}")

    parser.add_argument(flag, nargs="?", action=Refuse, help=argparse.SUPPRESS, dest=argparse.SUPPRESS)


def router_config(args: argparse.Namespace) -> RouterConfig:
    """What the options say, checked down to the policy file.

    Raises:
        ValueError: a value that cannot be meant, or options that do not fit together; names the field.
    """
    given = {name: value for name, value in vars(args).items() if name in KvRouterConfig.__struct_fields__}
    if args.load_aware:
        given |= _LOAD_AWARE
    config = KvRouterConfig(**given)
    if config.router_predicted_ttl_secs is not None and not config.use_kv_events:
        raise ValueError("--router-predicted-ttl-secs: needs KV events; without them see --router-ttl-secs")
    profile = load_profile(config)
    for selection in (config.router_prefill_policy, config.router_decode_policy):
        configure(config, profile, selection)
    return RouterConfig(
        RouterMode.KV,
        config,
        args.active_decode_blocks_threshold,
        args.active_prefill_tokens_threshold,
        args.active_prefill_tokens_threshold_frac,
        session_affinity_ttl_secs=args.session_affinity_ttl_secs,
        session_affinity_mode=args.session_affinity_mode,
    )
