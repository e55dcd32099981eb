"""What does the command line of `python -m dynamo.vllm` say?

Our own flags are parsed by our parser, every other by vLLM's own: what `vllm serve` takes for its engine, this takes.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from dynamo.engine.worker_args import (
    WorkerOptions,
    add_disaggregation_options,
    add_worker_options,
    positive_int,
    worker_options,
)
from dynamo.runtime.options import OptionParser
from dynamo.vllm import cpu
from dynamo.vllm.transport import TRANSPORTS, TransferOptions

log = logging.getLogger(__name__)

PROG = "python -m dynamo.vllm"


@dataclass(frozen=True)
class Words:
    """A command line after our parser: our own options, and the words meant for vLLM."""

    options: argparse.Namespace
    engine_words: list[str]
    parser: OptionParser


@dataclass(frozen=True)
class VllmOptions:
    """How to run one engine. `engine_args` is vLLM's `AsyncEngineArgs`; `given` are the flags the user typed."""

    engine_args: Any
    served_model_names: list[str] = field(default_factory=list)
    lora_modules: dict[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    transfer: TransferOptions = field(default_factory=TransferOptions)


def parser() -> OptionParser:
    """The options that are ours; vLLM's are listed by `--help-vllm`."""
    p = OptionParser(PROG, "Serve a model with vLLM. Takes every engine flag of vLLM too: see --help-vllm.")
    p.usage = f"{PROG} --model DIR_OR_HUB_ID [options] [vLLM engine flags]"
    add_worker_options(p)
    p.add_argument("--help-vllm", action="store_true", help="list vLLM's engine flags, and exit")
    engine = p.add_argument_group("engine")
    engine.add_argument(
        "--lora-modules", nargs="+", default=[], metavar="NAME=DIR",
        help="LoRA adapters to serve as models of their own; needs --enable-lora",
    )  # fmt: skip
    pair = p.add_argument_group("prefill and decode apart")
    add_disaggregation_options(p, pair)
    p.option(
        pair, "--kv-transport", default="auto", choices=TRANSPORTS, metavar="WAY",
        help="how KV passes: nixl (RDMA, shared memory, TCP), shm (files in memory), auto (nixl where it works); "
        "--kv-transfer-config wins",
    )  # fmt: skip
    p.option(
        pair, "--kv-transfer-host", default="127.0.0.1", metavar="HOST",
        help="the address at which other machines' workers reach this one's KV",
    )  # fmt: skip
    p.option(pair, "--kv-transfer-dir", metavar="DIR", help="where shm keeps its files (unset: /dev/shm/dynamo-kv-UID)")
    p.option(
        pair, "--kv-lease", type=positive_int, default=30, metavar="S",
        help="seconds for which a prompt's KV is kept once nobody says any more that it is wanted",
    )  # fmt: skip
    return p


def parse_ours(argv: Sequence[str]) -> Words:
    """Take our own options out of a command line. `--help`, and a wrong value of ours, end the program here."""
    p = parser()
    options, rest = p.parse_known(argv)
    words = Words(options, rest, p)
    _check_before_vllm(words)
    return words


def _check_before_vllm(words: Words) -> None:
    """What can be told without importing vLLM, which takes ten seconds."""
    model = _model_word(words)
    if model is None and not words.options.help_vllm and "--config" not in words.engine_words:
        words.parser.error("--model is required: a directory or a hub id")
    if model and model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        words.parser.error(f"--model: there is no directory {model}")


def shared_options(words: Words) -> WorkerOptions:
    """The options that all workers share. Ends the program with one line for a wrong one."""
    try:
        return worker_options(words.options)
    except ValueError as error:
        words.parser.error(str(error))


def before_vllm(words: Words) -> None:
    """Set what vLLM and the hub's library read once, when they are imported."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves the machine unasked
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # its dozens of INFO lines hide what matters
    model = _model_word(words)
    if model and Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is in the directory; do not ask the hub about it


def _model_word(words: Words) -> str | None:
    for word, following in pairwise([*words.engine_words, ""]):
        if word == "--model":
            return following
        if word.startswith("--model="):
            return word.removeprefix("--model=")
    return None


def engine_options(words: Words) -> VllmOptions:
    """vLLM's view of the command line. Imports vLLM, which takes seconds.

    Ends the program with one line and status 2 for a word that neither parser knows, or a value that vLLM refuses.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class EngineParser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            head, _, rest = message.partition("unrecognized arguments: ")
            if not head and rest:
                words.parser.unknown(rest.split()[0], self.flags())
            words.parser.error(message)

        def flags(self) -> list[str]:
            return [flag for action in self._actions for flag in action.option_strings]

    engine = AsyncEngineArgs.add_cli_args(EngineParser(prog=PROG, add_help=False))
    if words.options.help_vllm:
        print(argparse.ArgumentParser.format_help(engine))  # all of it; vLLM's own way lists groups alone
        raise SystemExit(0)
    given = frozenset(word.split("=", 1)[0].replace("_", "-") for word in words.engine_words if word.startswith("--"))
    namespace = engine.parse_args(words.engine_words)
    try:
        args = AsyncEngineArgs.from_cli_args(namespace)
    except (ValueError, TypeError) as error:
        words.parser.error(str(error).splitlines()[0])
    names = args.served_model_name or [args.model]
    return VllmOptions(
        engine_args=args,
        served_model_names=[names] if isinstance(names, str) else list(names),
        lora_modules=lora_modules(words),
        given=given,
        transfer=transfer_options(words),
    )


def transfer_options(words: Words) -> TransferOptions:
    """How KV is to pass between this worker and others."""
    o = words.options
    directory = Path(o.kv_transfer_dir).absolute() if o.kv_transfer_dir else None
    return TransferOptions(o.kv_transport, o.kv_transfer_host, directory, o.kv_lease)


def lora_modules(words: Words) -> dict[str, str]:
    """The adapters to serve, by name. Ends the program with one line for a word that is not NAME=DIR."""
    modules: dict[str, str] = {}
    for word in words.options.lora_modules:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            words.parser.error(f"--lora-modules: {word!r} is not NAME=DIR")
        if name in modules:
            words.parser.error(f"--lora-modules: {name!r} comes twice")
        if not Path(path).is_dir():
            words.parser.error(f"--lora-modules: {path} is not a directory")
        modules[name] = path
    return modules


def settle(options: VllmOptions, model: Path) -> None:
    """Set what the user left open, in the engine's arguments and in this process's environment, and log it.

    Args:
        options: as parsed; its `engine_args` are changed.
        model: the model's directory.
    """
    from vllm.platforms import current_platform

    args = options.engine_args
    args.model = str(model)
    args.served_model_name = options.served_model_names
    if args.enable_prefix_caching is None:
        args.enable_prefix_caching = True
    if not current_platform.is_cpu():
        return
    if "--dtype" not in options.given and cpu.is_float32(model):
        args.dtype = "float32"
        log.info("dtype float32, as the checkpoint (vLLM's auto would make it bfloat16)")
    if "--enforce-eager" not in options.given and not cpu.has_compiler(os.environ):
        args.enforce_eager = True
        log.warning("there is no C++ compiler, so the model is not compiled (--enforce-eager); tokens take longer")
    if "--max-model-len" not in options.given:
        args.max_model_len = -1  # vLLM's word for: as much of the model's context as the KV cache holds
    workers = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
    cores = len(os.sched_getaffinity(0))
    settings = cpu.environment(cpu.weights_bytes(model), cores, workers, os.environ)
    if args.kv_cache_memory_bytes is not None:
        settings = [s for s in settings if s.name != "VLLM_CPU_KVCACHE_SPACE"]  # the variable would win over the flag
    for setting in settings:
        os.environ[setting.name] = setting.value
        log.info("%s=%s (%s); set it yourself to change that", *setting)
