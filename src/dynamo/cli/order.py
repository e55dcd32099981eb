"""What does a `dynamo run` command line ask for?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from dynamo.frontend.args import ROUTER_MODES
from dynamo.runtime.options import OptionParser

INPUTS = ("http", "text", "stdin", "batch:FILE.jsonl")
READY_TIMEOUT_S = 1800.0  # a large model comes over the network and is compiled before it serves


def parser() -> OptionParser:
    """The command line of `dynamo run`."""
    p = OptionParser(
        "dynamo run",
        "Serve MODEL with a frontend and workers of your own, and use it: "
        "in=http|text|stdin|batch:FILE.jsonl, out=vllm|mocker|echo. Words after -- go to the engine.",
    )
    p.usage = "dynamo run [MODEL] [in=INPUT] [out=ENGINE] [options] [-- engine flags]"
    p.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or hub id; without one, a demo model made on the spot"
    )
    what = p.add_argument_group("model")
    p.option(what, "--model-path", metavar="PATH", help="another way to say MODEL")
    p.option(
        what, "--model-name", metavar="NAME", help="name that clients use (default: the directory's, or the hub id)"
    )
    p.option(what, "--context-length", metavar="N", type=int, help="tokens of prompt and answer together")
    p.option(what, "--kv-cache-block-size", metavar="N", type=int, help="tokens a KV block")
    workers = p.add_argument_group("workers")
    p.option(workers, "--num-workers", metavar="N", type=int, default=1, help="how many workers share the load")
    p.option(
        workers, "--prefill-workers", metavar="N", type=int, default=0,
        help="so many more that only compute prompts; the others then decode (vllm, mocker)",
    )  # fmt: skip
    p.option(workers, "--tensor-parallel-size", metavar="N", type=int, help="GPUs that one worker spans (vllm)")
    p.option(
        workers, "--router-mode", env="DYN_ROUTER_MODE", default="round-robin", choices=ROUTER_MODES, metavar="MODE",
        help="how the frontend chooses a worker: " + ", ".join(ROUTER_MODES),
    )  # fmt: skip
    p.option(
        workers,
        "--ready-timeout",
        metavar="S",
        type=float,
        default=READY_TIMEOUT_S,
        help="seconds until all must be ready",
    )
    http = p.add_argument_group("in=http")
    p.option(http, "--http-host", metavar="HOST", env="DYN_HTTP_HOST", default="127.0.0.1", help="address to listen on")
    p.option(
        http,
        "--http-port",
        metavar="PORT",
        env="DYN_HTTP_PORT",
        type=int,
        default=8000,
        help="port; 0 takes a free one",
    )
    p.option(
        http, "--http-workers", env="DYN_HTTP_WORKERS", metavar="N", type=int, default=1,
        help="processes of the frontend that share the port, for more than one core",
    )  # fmt: skip
    p.option(http, "--say", metavar="TEXT", help="when ready, send this and show the answer")
    ask = p.add_argument_group("in=text, stdin, batch")
    p.option(ask, "--max-tokens", metavar="N", type=int, help="longest answer (default: the model decides)")
    p.option(ask, "--temperature", metavar="T", type=float, help="0 always takes the likeliest token")
    p.option(ask, "--system", metavar="TEXT", help="system prompt of in=text")
    p.option(ask, "--concurrency", metavar="N", type=int, default=64, help="requests in flight of in=batch")
    p.add_argument_group("in=batch").add_argument(
        "--overwrite", action="store_true", help="replace an output.jsonl that is there"
    )
    p.add_argument("-v", "--verbose", action="store_true", help="show what all processes print from the start")
    return p


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A command line, taken apart."""

    options: Any  # argparse.Namespace
    how: str
    batch_file: Path | None
    out: str | None
    engine_flags: Sequence[str]


def parse(argv: Sequence[str], stdin_is_terminal: bool) -> Order:
    """Take a command line apart; wrong words end the program with status 2."""
    words, flags = list(argv), []
    if "--" in words:
        cut = words.index("--")
        words, flags = words[:cut], words[cut + 1 :]
    chosen: dict[str, str] = {}
    rest = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in ("in", "out"):
            chosen[key] = value
        else:
            rest.append(word)
    p = parser()
    options = p.parse(rest)
    if options.model and options.model_path:
        p.error("MODEL and --model-path are the same: give one")
    for name in ("num_workers", "http_workers", "concurrency"):
        if getattr(options, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.prefill_workers < 0:
        p.error("--prefill-workers must be at least 0")
    how = chosen.get("in") or ("text" if stdin_is_terminal else "stdin")
    batch_file = None
    if how.startswith("batch:"):
        how, batch_file = "batch", Path(how.removeprefix("batch:"))
    elif how not in INPUTS:
        p.error(f"in={how}: choose one of {', '.join(INPUTS)}")
    return Order(options=options, how=how, batch_file=batch_file, out=chosen.get("out"), engine_flags=flags)
