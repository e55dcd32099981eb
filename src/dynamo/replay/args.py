"""What can be set about a replay?"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo.replay.experiment import EngineLimits, Experiment
from dynamo.replay.pools import Pools
from dynamo.replay.routing import routing_names
from dynamo.replay.simulate import Goal
from dynamo.replay.traces import FORMATS, SyntheticWorkload
from dynamo.router.config import DEFAULT_POLICY, KvRouterConfig
from dynamo.router.split import POLICIES as SPLIT_POLICIES
from dynamo.router.split_settings import SplitSettings, changed
from dynamo.runtime.options import OptionParser


class ReplayOptions(msgspec.Struct, frozen=True):
    """The command line, read and checked: one experiment a policy, and where to write what came out."""

    experiments: list[Experiment]
    json_path: Path | None
    jsonl_path: Path | None
    html_path: Path | None
    jobs: int | None
    quiet: bool


def make_parser() -> OptionParser:
    """The parser of `python -m dynamo.replay`."""
    parser = OptionParser(
        "dynamo replay",
        "Simulate engines and routing on a virtual clock: what would these requests be like on that many workers?",
    )
    parser.add_argument("trace", nargs="*", help="trace files, Mooncake JSONL or Azure CSV; none for a synthetic load")
    _workload(parser)
    _synthetic(parser)
    _fleet(parser)
    _output(parser)
    return parser


def _workload(parser: OptionParser) -> None:
    group = parser.add_argument_group("workload")
    option = parser.option
    option(group, "--format", choices=FORMATS, help="of the trace files; told by the name's end if not given")
    option(group, "--trace-block-size", type=int, help="tokens a hash id stands for, 512 in Mooncake's traces")
    option(group, "--speedup", type=float, default=1.0, help="arrivals come so many times as fast")
    option(group, "--concurrency", type=int, help="so many requests at a time, whatever their timestamps say")
    option(group, "--limit", type=int, help="only the first so many requests")
    option(group, "--max-sim-time-ms", type=float, help="stop at this time of the virtual clock")
    option(group, "--seed", type=int, default=0, help="of everything that is random")


def _synthetic(parser: OptionParser) -> None:
    group = parser.add_argument_group("synthetic load (no trace files)")
    option = parser.option
    option(group, "--input-tokens", "--isl", type=int, help="of each prompt")
    option(group, "--output-tokens", "--osl", type=int, help="of each answer")
    option(group, "--requests", type=int, default=1000, help="how many, or how many sessions")
    option(group, "--spread", type=float, default=0.0, help="vary lengths: 0.5 is from half to one and a half")
    option(group, "--request-rate", type=float, help="a second, at random times")
    option(group, "--arrival-interval-ms", type=float, help="between two requests, exactly")
    option(group, "--shared-prefix-ratio", type=float, default=0.0, help="share of each prompt that others have too")
    option(group, "--prefix-groups", type=int, default=0, help="how many different shared prefixes there are")
    option(group, "--zipf", type=float, default=0.0, help="group k is as likely as 1/k^zipf")
    option(group, "--turns", type=int, default=1, help="requests of a session, one after the other")
    option(group, "--turn-delay-ms", type=float, default=0.0, help="from an answer to the next turn")
    option(group, "--history", type=bool, default=False, help="a turn's prompt begins with all before it")


def _fleet(parser: OptionParser) -> None:
    group = parser.add_argument_group("workers and routing")
    option = parser.option
    default = EngineLimits()
    option(group, "--workers", "--num-workers", type=int, default=4, help="simulated engines")
    option(group, "--policy", default=DEFAULT_POLICY, help=f"who routes: {', '.join(routing_names())}")
    option(group, "--compare", help="several policies, by commas: each in a process of its own, one table")
    option(group, "--router-config", help="KvRouterConfig as JSON")
    option(group, "--kv-event-lag-ms", type=float, default=0.0, help="until the router hears of a cache change")
    option(group, "--num-gpu-blocks", type=int, default=default.num_gpu_blocks, help="KV blocks of each engine")
    option(group, "--block-size", type=int, default=default.block_size, help="tokens in one of them")
    option(group, "--max-num-seqs", type=int, default=default.max_num_seqs, help="sequences in a step")
    option(group, "--max-num-batched-tokens", type=int, default=default.max_num_batched_tokens, help="in a step")
    option(group, "--max-model-len", type=int, help="longest sequence; what the cache holds if not given")
    option(group, "--enable-prefix-caching", type=bool, default=True, help="find shared blocks in the cache")
    option(group, "--enable-chunked-prefill", type=bool, default=True, help="compute long prompts in parts")
    option(group, "--preemption-mode", choices=("lifo", "fifo"), default="lifo", help="who is pushed out")
    option(group, "--speedup-ratio", type=float, default=1.0, help="engines are so many times as fast")
    option(group, "--decode-speedup-ratio", type=float, default=1.0, help="decoding is, once more")
    option(group, "--prefill-workers", "--num-prefill-workers", type=int, help="engines that only compute prompts")
    option(group, "--decode-workers", "--num-decode-workers", type=int, help="engines that answer (both: no --workers)")
    option(group, "--kv-transfer-bandwidth", type=float, default=64.0, help="between them in GB/s, 0 is no limit")
    option(group, "--kv-bytes-per-token", type=int, help="that travel; if not given, KV takes no time on its way")
    option(group, "--kv-transfer-latency-ms", type=float, default=0.0, help="of each transfer, whatever its length")
    option(
        group,
        "--kv-transfer-timing-mode",
        choices=("full_prompt", "destination_missing"),
        default="full_prompt",
        help="whether all of a prompt travels, or only what the decode worker lacks",
    )
    option(group, "--split-policy", choices=tuple(SPLIT_POLICIES), help="which prompts go to prefill workers")
    option(group, "--router-conditional-disagg", type=bool, default=False, help="not all; by isl_bounding if not said")
    option(group, "--router-conditional-disagg-config", help="JSON: policy, eff_isl_threshold, and so on")
    option(group, "--sla-ttft-ms", type=float, help="count requests that hold this")
    option(group, "--sla-itl-ms", type=float, help="and this")
    option(group, "--sla-e2e-ms", type=float, help="and this")


def _output(parser: OptionParser) -> None:
    group = parser.add_argument_group("output")
    option = parser.option
    option(group, "--json", type=Path, help="write summaries, curves and samples here")
    option(group, "--jsonl", type=Path, help="write one line a request here (one policy only)")
    option(group, "--html", type=Path, help="write a report with plots here")
    option(group, "--jobs", type=int, help="processes at a time for --compare; as many as cores if not given")
    option(group, "--quiet", type=bool, default=False, help="show no progress")


def parse_options(argv: Sequence[str] | None = None) -> ReplayOptions:
    """Read the command line; what cannot be meant ends the program with a word on it."""
    parser = make_parser()
    args = parser.parse(argv)
    policies = [name.strip() for name in args.compare.split(",")] if args.compare else [args.policy]
    if args.jsonl is not None and len(policies) > 1:
        parser.error("--jsonl: takes the requests of one policy; leave out --compare")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs: must be at least 1, got {args.jobs}")
    try:
        experiments = [_experiment(args, policy) for policy in policies]
    except ValueError as e:
        parser.error(str(e))
    return ReplayOptions(experiments, args.json, args.jsonl, args.html, args.jobs, args.quiet)


def _experiment(args: argparse.Namespace, policy: str) -> Experiment:
    return Experiment(
        trace_files=args.trace,
        trace_format=args.format,
        trace_block_size=args.trace_block_size,
        shared_prefix_ratio=args.shared_prefix_ratio if args.trace else 0.0,
        num_prefix_groups=args.prefix_groups if args.trace else 0,
        synthetic=None if args.trace else _workload_of(args),
        limit=args.limit,
        num_workers=args.workers,
        engine=EngineLimits(
            num_gpu_blocks=args.num_gpu_blocks,
            block_size=args.block_size,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=args.enable_prefix_caching,
            enable_chunked_prefill=args.enable_chunked_prefill,
            preemption_mode=args.preemption_mode,
            speedup_ratio=args.speedup_ratio,
            decode_speedup_ratio=args.decode_speedup_ratio,
        ),
        pools=_pools(args),
        split=_split(args),
        policy=policy,
        router=_router(args),
        speedup=args.speedup,
        concurrency=args.concurrency,
        kv_event_lag_ms=args.kv_event_lag_ms,
        max_sim_time_ms=args.max_sim_time_ms,
        goal=Goal(args.sla_ttft_ms, args.sla_itl_ms, args.sla_e2e_ms),
        seed=args.seed,
    )


def _pools(args: argparse.Namespace) -> Pools | None:
    if args.prefill_workers is None and args.decode_workers is None:
        return None
    if args.prefill_workers is None or args.decode_workers is None:
        raise ValueError("--prefill-workers, --decode-workers: give both, or --workers for engines that do both parts")
    return Pools(
        prefill_workers=args.prefill_workers,
        decode_workers=args.decode_workers,
        kv_transfer_bandwidth=args.kv_transfer_bandwidth,
        kv_bytes_per_token=args.kv_bytes_per_token,
        kv_transfer_latency_ms=args.kv_transfer_latency_ms,
        kv_transfer_timing_mode=args.kv_transfer_timing_mode,
    )


def _split(args: argparse.Namespace) -> str | None:
    """The policy asked for in one of two ways; the first is ours, the others are ai-dynamo's."""
    if args.split_policy is not None:
        return str(args.split_policy)
    return _router(args).conditional_disagg_policy if args.router_conditional_disagg else None


def _router(args: argparse.Namespace) -> KvRouterConfig:
    config = KvRouterConfig.from_json(args.router_config) if args.router_config else KvRouterConfig()
    if args.router_conditional_disagg_config is None:
        return config
    try:
        return changed(config, SplitSettings.from_json(args.router_conditional_disagg_config).fields())
    except ValueError as e:
        raise ValueError(f"--router-conditional-disagg-config: {e}") from None


def _workload_of(args: argparse.Namespace) -> SyntheticWorkload:
    if args.input_tokens is None or args.output_tokens is None:
        raise ValueError("trace: give trace files, or --input-tokens and --output-tokens for a synthetic load")
    if sum(value is not None for value in (args.request_rate, args.arrival_interval_ms, args.concurrency)) != 1:
        raise ValueError("a synthetic load takes exactly one of --request-rate, --arrival-interval-ms, --concurrency")
    return SyntheticWorkload(
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        request_count=args.requests,
        request_rate=args.request_rate,
        arrival_interval_ms=args.arrival_interval_ms,
        turns_per_session=args.turns,
        inter_turn_delay_ms=args.turn_delay_ms,
        shared_prefix_ratio=args.shared_prefix_ratio,
        num_prefix_groups=args.prefix_groups,
        zipf=args.zipf,
        spread=args.spread,
        history=args.history,
        seed=args.seed,
    )
