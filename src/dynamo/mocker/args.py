"""What can be set about simulated workers?"""

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from dynamo.engine.worker_args import (
    WorkerOptions,
    add_disaggregation_options,
    add_worker_options,
    positive_int,
    refuse,
    worker_options,
)
from dynamo.mocker.batching import SchedulerConfig
from dynamo.mocker.sampler import Reasoning
from dynamo.mocker.sequence import Sequence as MockSequence
from dynamo.mocker.timing import StepTiming
from dynamo.mocker.transfer import DEFAULT_BANDWIDTH_GB_S, DTYPES
from dynamo.runtime.options import OptionParser

EngineType = Literal["vllm", "sglang", "trtllm"]

BLOCK_SIZES: dict[str, int] = {"vllm": 64, "sglang": 1, "trtllm": 32}  # tokens; what each engine's mocker defaults to
DEFAULT_CONTEXT = 32768  # tokens, for a model whose config says nothing
_NEW_TOKEN_RATIO = 0.7  # SGLang's first guess of how much of max_tokens a request will use

_SGLANG = {
    "sglang_schedule_policy": "fifo",
    "sglang_max_prefill_tokens": 16384,
    "sglang_chunked_prefill_size": 8192,
    "sglang_clip_max_new_tokens": 4096,
    "sglang_schedule_conservativeness": 1.0,
}
_FILE_ALIASES = {"num_gpu_blocks": "num_gpu_blocks_override", "dp_size": "data_parallel_size"}
_LATER = {
    "--planner-profile-data": "timing from profile data is not in this version; see --speedup-ratio",
    "--ais-perf-model": "timing from a performance model is not in this version; see --speedup-ratio",
    "--ais-system": "timing from a performance model is not in this version; see --speedup-ratio",
    "--ais-backend-version": "timing from a performance model is not in this version; see --speedup-ratio",
    "--ais-tp-size": "timing from a performance model is not in this version; see --speedup-ratio",
    "--ais-nextn": "speculative decoding is not in this version",
    "--is-prefill-worker": "is now --disaggregation-mode prefill",
    "--is-decode-worker": "is now --disaggregation-mode decode",
    "--response-replay-trace-path": "replaying responses is not in this version",
    "--zmq-kv-events-ports": "KV events in an engine's own wire format are not in this version",
    "--zmq-replay-ports": "KV events in an engine's own wire format are not in this version",
    "--sglang-generate": "SGLang's own HTTP interface is not in this version",
}


class MockerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, read and checked. Times in seconds; `stagger_delay` -1 leaves the choice to the program."""

    model_path: str
    model_name: str | None
    engine_type: EngineType
    num_workers: int
    speedup_ratio: float
    decode_speedup_ratio: float
    startup_time: float
    stagger_delay: float
    reasoning: Reasoning | None
    num_gpu_blocks_override: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    preemption_mode: Literal["lifo", "fifo"]
    watermark: float
    data_parallel_size: int
    max_model_len: int | None
    sglang_schedule_policy: Literal["fifo", "lpm"]
    sglang_max_prefill_tokens: int
    sglang_chunked_prefill_size: int
    sglang_clip_max_new_tokens: int
    sglang_schedule_conservativeness: float
    bootstrap_ports: tuple[int, ...]
    bootstrap_host: str
    kv_transfer_bandwidth: float
    kv_bytes_per_token: int | None
    kv_cache_dtype: str
    worker: WorkerOptions

    @property
    def timing(self) -> StepTiming:
        """How long steps take."""
        return StepTiming(self.speedup_ratio, self.decode_speedup_ratio)

    def scheduler(self, model_length: int | None) -> SchedulerConfig:
        """The limits of one rank of the engine simulated. `model_length`: what the model's config says, in tokens.

        Raises:
            ValueError: limits that do not fit together; names the flags.
        """
        if not self.enable_chunked_prefill and (self.max_model_len or 0) > self.max_num_batched_tokens:
            raise ValueError(
                f"--max-model-len {self.max_model_len}: without chunked prefill a prompt must fit one step of "
                f"--max-num-batched-tokens {self.max_num_batched_tokens}"
            )
        sglang = self.engine_type == "sglang"
        batch = min(self.sglang_max_prefill_tokens, self.sglang_chunked_prefill_size)
        return SchedulerConfig(
            num_blocks=self.num_gpu_blocks_override,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=batch if sglang else self.max_num_batched_tokens,
            max_model_len=self.max_model_len or model_length or DEFAULT_CONTEXT,
            enable_prefix_caching=self.enable_prefix_caching,
            enable_chunked_prefill=self.enable_chunked_prefill,
            preemption_mode=self.preemption_mode,
            watermark=self.watermark,
            schedule_policy=self.sglang_schedule_policy if sglang else "fifo",
            mix_prefill_and_decode=not sglang,
            reserve={"vllm": _known_tokens, "sglang": self._expected_tokens, "trtllm": _all_tokens}[self.engine_type],
        )

    def _expected_tokens(self, seq: MockSequence) -> int:
        """SGLang admits by a guess of how much will be put out."""
        left = min(seq.max_tokens - seq.num_output, self.sglang_clip_max_new_tokens)
        return seq.num_tokens + int(left * min(1.0, _NEW_TOKEN_RATIO * self.sglang_schedule_conservativeness))


def _known_tokens(seq: MockSequence) -> int:
    """vLLM admits what fits now, and preempts later."""
    return seq.num_tokens


def _all_tokens(seq: MockSequence) -> int:
    """TensorRT-LLM's guaranteed_no_evict admits only what will fit to its end."""
    return seq.num_prompt + seq.max_tokens


def make_parser() -> OptionParser:
    """The parser of `python -m dynamo.mocker`."""
    parser = OptionParser(
        "python -m dynamo.mocker",
        "Workers without a model: continuous batching over a paged KV cache with prefix reuse, simulated in real "
        "time. Output is random words of the model's vocabulary, the same for the same request.",
    )
    parser.usage = "%(prog)s --model-path DIR [option ...]"
    model = parser.add_argument_group("model")
    parser.option(model, "--model-path", metavar="DIR", help="model directory or hub id, for tokenizer and template")
    parser.option(
        model, "--model-name", metavar="NAME", help="what requests call the model (unset: the directory's name)"
    )
    parser.option(model, "--engine-type", choices=["vllm", "sglang", "trtllm"], default="vllm", help="what to simulate")

    speed = parser.add_argument_group("simulation")
    parser.option(speed, "--num-workers", type=positive_int, metavar="N", default=1, help="workers in this process")
    parser.option(
        speed, "--speedup-ratio", type=_ratio, metavar="X", default=1.0, help="divide all times; 0 means no waiting"
    )
    parser.option(
        speed, "--decode-speedup-ratio", type=_ratio, metavar="X", default=1.0, help="divide decode's times once more"
    )
    parser.option(
        speed, "--startup-time", type=_ratio, metavar="S", default=0.0, help="seconds that loading the model takes"
    )
    parser.option(
        speed, "--stagger-delay", type=float, metavar="S", default=-1.0, help="seconds between starts; -1 chooses"
    )
    parser.option(
        speed,
        "--reasoning",
        type=_reasoning,
        metavar="JSON",
        help='think first: JSON with "start_thinking_token_id", "end_thinking_token_id", "thinking_ratio"',
    )
    parser.option(speed, "--extra-engine-args", metavar="FILE", help="JSON file with any of these options; flags win")

    engine = parser.add_argument_group("engine limits")
    parser.option(
        engine, "--num-gpu-blocks-override", type=positive_int, metavar="N", default=16384, help="KV blocks a rank"
    )
    parser.option(
        engine,
        "--block-size",
        type=positive_int,
        metavar="N",
        help="tokens a block (unset: 64 vllm, 1 sglang, 32 trtllm)",
    )
    parser.option(
        engine, "--max-num-seqs", type=positive_int, metavar="N", default=256, help="sequences running at once"
    )
    parser.option(
        engine, "--max-num-batched-tokens", type=positive_int, metavar="N", default=8192, help="tokens a step"
    )
    parser.option(engine, "--max-model-len", type=positive_int, metavar="N", help="context length (unset: the model's)")
    parser.option(engine, "--enable-prefix-caching", type=bool, default=True, help="reuse blocks with equal prefixes")
    parser.option(engine, "--enable-chunked-prefill", type=bool, default=True, help="split long prompts over steps")
    parser.option(
        engine, "--preemption-mode", choices=["lifo", "fifo"], default="lifo", help="push out newest or oldest"
    )
    parser.option(engine, "--data-parallel-size", type=positive_int, metavar="N", default=1, help="ranks a worker")

    sglang = parser.add_argument_group("only with --engine-type sglang")
    parser.option(sglang, "--sglang-schedule-policy", choices=["fifo", "fcfs", "lpm"], help="order of the queue")
    parser.option(sglang, "--sglang-max-prefill-tokens", type=positive_int, metavar="N", help="prompt tokens a step")
    parser.option(sglang, "--sglang-chunked-prefill-size", type=positive_int, metavar="N", help="prompt tokens a chunk")
    parser.option(
        sglang, "--sglang-clip-max-new-tokens", type=positive_int, metavar="N", help="expect at most this much output"
    )
    parser.option(sglang, "--sglang-schedule-conservativeness", type=_ratio, metavar="X", help="more admits less")
    pair = parser.add_argument_group("prefill and decode apart")
    add_disaggregation_options(parser, pair)
    parser.option(
        pair,
        "--bootstrap-ports",
        type=_ports,
        default="",
        metavar="LIST",
        help="one port a prefill worker, where decode workers wait that start with it; 0 takes a free one",
    )
    parser.option(pair, "--bootstrap-host", default="127.0.0.1", metavar="HOST", help="address of the bootstrap ports")
    parser.option(
        pair,
        "--kv-transfer-bandwidth",
        type=_ratio,
        default=DEFAULT_BANDWIDTH_GB_S,
        metavar="GB/S",
        help="how fast KV moves; 0 means at once",
    )
    parser.option(
        pair, "--kv-bytes-per-token", type=positive_int, metavar="N", help="size of KV (unset: by the model's config)"
    )
    parser.option(
        pair, "--kv-cache-dtype", choices=list(DTYPES), default="auto", help="kind of numbers that size is for"
    )
    trtllm = parser.add_argument_group("only with --engine-type trtllm")
    parser.option(
        trtllm,
        "--trtllm-capacity-scheduler-policy",
        choices=["guaranteed_no_evict"],
        help="admit what fits to its end",
    )
    add_worker_options(parser)
    for flag, why in _LATER.items():
        refuse(parser, flag, why)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> MockerOptions:
    """Read the command line. Ends the program with one line on stderr where it is wrong."""
    parser = make_parser()
    args = parser.parse(argv)
    try:
        if args.extra_engine_args:
            parser.set_defaults(**_read_file(parser, args.extra_engine_args))
            args = parser.parse(argv)
        return _options(args)
    except ValueError as e:
        parser.error(str(e))


def _options(args: argparse.Namespace) -> MockerOptions:
    values = vars(args)
    if not args.model_path:
        raise ValueError("--model-path: is required: tokenizer, template and context length are the model's")
    for name, default in _SGLANG.items():
        if values[name] is None:
            values[name] = default
        elif args.engine_type != "sglang":
            raise ValueError(f"--{name.replace('_', '-')}: is for --engine-type sglang, not {args.engine_type}")
    if args.trtllm_capacity_scheduler_policy and args.engine_type != "trtllm":
        raise ValueError(f"--trtllm-capacity-scheduler-policy: is for --engine-type trtllm, not {args.engine_type}")
    if args.sglang_schedule_policy == "fcfs":
        args.sglang_schedule_policy = "fifo"
    ports = args.bootstrap_ports
    if ports and args.disaggregation_mode != "prefill":
        raise ValueError("--bootstrap-ports: are for --disaggregation-mode prefill")
    if ports and len(ports) != args.num_workers:
        raise ValueError(f"--bootstrap-ports: names {len(ports)} ports, but there are {args.num_workers} workers")
    values["block_size"] = args.block_size or BLOCK_SIZES[args.engine_type]
    values.setdefault("watermark", 0.01)
    fields = {name: values[name] for name in MockerOptions.__struct_fields__ if name != "worker"}
    return MockerOptions(worker=worker_options(args), **fields)


def _read_file(parser: OptionParser, path: str) -> dict[str, Any]:
    """The options in an `--extra-engine-args` file, converted as on the command line. Raises ValueError."""
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"--extra-engine-args: cannot read {path}: {e}") from None
    if not isinstance(given, dict):
        raise ValueError(f"--extra-engine-args: {path} must hold a JSON object")  # noqa: TRY004 - one kind of error
    actions = {action.dest: action for action in parser._actions}
    known = [name for name in MockerOptions.__struct_fields__ if name != "worker"] + list(_FILE_ALIASES)
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = _FILE_ALIASES.get(key, str(key))
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"--extra-engine-args: {path}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
        try:
            values[name] = _converted(actions.get(name), value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as e:
            raise ValueError(f"--extra-engine-args: {path}: {key}: {e}") from None
    return values


def _converted(action: argparse.Action | None, value: Any) -> Any:
    if action is None:  # the watermark, which has no flag
        share = float(value)
        if not 0 <= share < 1:
            raise ValueError(f"{value} is not a share from 0 up to 1")
        return share
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")  # noqa: TRY004 - as the flags do
        return value
    convert: Any = action.type or str
    converted = convert(json.dumps(value) if isinstance(value, dict) else str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, action.choices))}")
    return converted


def _ports(text: str) -> tuple[int, ...]:
    ports = tuple(int(word) for word in text.split(",") if word.strip())
    for port in ports:
        if not 0 <= port < 1 << 16:
            raise argparse.ArgumentTypeError(f"{port} is not a port")
    return ports


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def _reasoning(text: str) -> Reasoning:
    try:
        return msgspec.json.decode(text, type=Reasoning)
    except msgspec.DecodeError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
