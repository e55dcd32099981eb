"""What does `dynamo run` do? Serve a model by one command: start everything, use it, and leave nothing behind."""

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from dynamo.cli import plan
from dynamo.cli.chat import Chat
from dynamo.cli.children import ChildDied, Children
from dynamo.cli.client import ApiError, ChatClient
from dynamo.cli.demo_model import make_demo_model
from dynamo.cli.order import Order, parse
from dynamo.cli.ready import NotReady, wait_until_ready

SAID_TOKENS = 48  # of the answer to --say: enough to see that it answers
TELL_AGAIN_S = 0.5  # input() sleeps on if a signal comes in the instant before it begins to wait
DEMO_MAX_TOKENS = 128  # the demo model hardly ever ends an answer by itself
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    order = parse(argv, sys.stdin.isatty())
    console = Console(stderr=True, soft_wrap=True)
    try:
        return _run(order, console)
    except plan.PlanError as e:
        console.print(f"dynamo run: error: {e}", style="red", markup=False, highlight=False)
        return EXIT_USAGE
    except (ChildDied, NotReady, ApiError, OSError) as e:
        console.print(f"dynamo run: {e}", style="red", markup=False, highlight=False)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(order: Order, console: Console) -> int:
    options = order.options
    if order.how == "batch":
        _check_batch(order)
    prompt = _read_prompt() if order.how == "stdin" else ""
    engine = plan.choose_engine(order.out)
    cache = Path(os.environ.get("DYN_CACHE_DIR") or Path.home() / ".cache" / "dynamo")
    model = plan.find_model(options.model or options.model_path, options.model_name, cache)
    if model.is_demo:
        console.print(
            f"No model was named: this is the demo model, random weights that speak nonsense ({model.path}).",
            style="yellow", highlight=False,
        )  # fmt: skip
        make_demo_model(Path(model.path))
    serve_others = order.how == "http"
    host = options.http_host if serve_others else "127.0.0.1"
    port = _port(host, options.http_port if serve_others else 0)
    request = plan.Request(
        model=model, engine=engine, workers=options.num_workers, prefill_workers=options.prefill_workers,
        host=host, port=port, http_workers=options.http_workers if serve_others else 1,
        router_mode=options.router_mode, tensor_parallel=options.tensor_parallel_size,
        context_length=options.context_length, block_size=options.kv_cache_block_size,
        engine_flags=order.engine_flags, gpus=plan.visible_gpus(), cores=len(os.sched_getaffinity(0)),
    )  # fmt: skip
    client = ChatClient("127.0.0.1" if host in ("0.0.0.0", "::") else host, port, model.name)  # noqa: S104 - compared
    with tempfile.TemporaryDirectory(prefix="dynamo-run-") as discovery, _children(options.verbose) as children:
        for spec in plan.processes(request, os.environ, Path(discovery)):
            children.start(spec)
        took = wait_until_ready(children, client, request.all_workers, options.ready_timeout, console)
        console.print(f"ready after {took:.1f} s", style="dim", highlight=False)
        fields = _fields(options, model.is_demo)
        match order.how:
            case "http":
                _serve(client, request, options.say, fields)
                _wait(children)
            case "text":
                Chat(client, Console(), fields, options.system).run()
            case "stdin":
                _answer(client, prompt, fields)
            case _:
                assert order.batch_file is not None
                base_url = f"http://127.0.0.1:{port}"
                return _batch(order.batch_file, base_url, model.name, options.concurrency, fields, children, console)
    return 0


def _check_batch(order: Order) -> None:
    from dynamo.cli.batch import BatchError, check_source

    assert order.batch_file is not None
    try:
        check_source(order.batch_file, order.options.overwrite)
    except BatchError as e:
        raise plan.PlanError(str(e)) from e


def _read_prompt() -> str:
    prompt = sys.stdin.read().strip()
    if not prompt:
        raise plan.PlanError("in=stdin: there is nothing on standard input")
    return prompt


def _port(host: str, port: int) -> int:
    """`port`, or a free one for 0.

    Raises:
        PlanError: it is taken, or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise plan.PlanError(f"cannot listen on {host}:{port}: {e.strerror}; say another --http-port") from e
        free: int = s.getsockname()[1]
        return free


def _fields(options: Any, is_demo: bool) -> dict[str, Any]:
    fields = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    if is_demo and options.max_tokens is None:
        fields["max_tokens"] = DEMO_MAX_TOKENS
    return {name: value for name, value in fields.items() if value is not None}


@contextlib.contextmanager
def _children(show: bool) -> Iterator[Children]:
    """The children, ended whatever ends us; a child's death is raised in the main thread as ChildDied."""
    children = Children(show=show)
    noticed = threading.Event()
    main_thread = threading.get_ident()

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    def died(number: int, frame: FrameType | None) -> None:
        noticed.set()
        children.check()

    def tell() -> None:
        while not noticed.is_set():
            signal.pthread_kill(main_thread, signal.SIGUSR1)
            noticed.wait(TELL_AGAIN_S)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    signal.signal(signal.SIGUSR1, died)
    children.on_death(tell)
    try:
        yield children
    finally:
        noticed.set()
        children.on_death(None)
        children.stop()


def _serve(client: ChatClient, request: plan.Request, say: str | None, fields: dict[str, Any]) -> None:
    """Tell how to reach it, and show that it answers."""
    address = f"http://{'[' + request.host + ']' if ':' in request.host else request.host}:{request.port}"
    body = {"model": client.model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
    print(f"\nserving {client.model} at {address}/v1  (OpenAI API)\ntry:")
    print(f"  curl -N {address}/v1/chat/completions -H 'Content-Type: application/json' \\")
    print(f"    -d '{json.dumps(body | {'stream': True})}'")
    if say:
        print(f"\nyou ▸ {say}")
        _answer(client, say, fields | {"max_tokens": min(SAID_TOKENS, fields.get("max_tokens", SAID_TOKENS))})
    print("\nCtrl-C stops everything.", flush=True)


def _wait(children: Children) -> None:
    """Show what the processes say until Ctrl-C. Their death, or SIGTERM, is raised here by a signal's handler."""
    children.show = True
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()


def _answer(client: ChatClient, prompt: str, fields: dict[str, Any]) -> None:
    for piece in client.stream([{"role": "user", "content": prompt}], **fields):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _batch(
    source: Path,
    base_url: str,
    model: str,
    concurrency: int,
    fields: dict[str, Any],
    children: Children,
    console: Console,
) -> int:
    from dynamo.cli.batch import BatchError, Settings  # aiohttp takes a quarter of a second to load
    from dynamo.cli.batch_command import show_batch

    try:
        return show_batch(source, Settings(base_url, model, concurrency, fields), children, console)
    except BatchError as e:
        raise plan.PlanError(str(e)) from e
