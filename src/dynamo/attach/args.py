"""Which server is to be a worker, and how? The command line of `dynamo attach`."""

import ssl
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from dynamo.engine.worker_args import WorkerOptions, add_worker_options, positive_int, worker_options
from dynamo.runtime.options import OptionParser

Mode = Literal["auto", "tokens", "openai"]


class AttachOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, read and checked. `url` has no slash at its end and no `/v1`."""

    url: str
    served_model: str | None = None
    model_name: str | None = None
    model_path: str | None = None
    mode: Mode = "auto"
    kv_events: str | None = None
    kv_replay: str | None = None
    kv_topic: str = ""
    block_size: int | None = None
    api_key: str | None = None
    tls_ca: str | None = None
    tls_verify: bool = True
    worker: WorkerOptions = msgspec.field(default_factory=WorkerOptions)

    def shown(self) -> dict[str, object]:
        """All options as plain data, without the secret."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        return {**plain, "api_key": "***" if self.api_key else None}


def parse_args(argv: Sequence[str] | None = None) -> AttachOptions:
    """Read the command line. Ends the program with one line on stderr where it is wrong."""
    parser = OptionParser("python -m dynamo.attach", "Make a running vLLM or SGLang OpenAI server a worker.")
    parser.usage = "%(prog)s URL [option ...]"
    parser.add_argument("url", metavar="URL", nargs="?", help="the server's address, such as http://host:8000")
    model = parser.add_argument_group("model")
    parser.option(model, "--served-model", metavar="ID", help="which of the server's models (unset: its only one)")
    parser.option(
        model, "--model-name", metavar="NAME", help="what requests call the model (unset: as the server does)"
    )
    parser.option(
        model,
        "--model-path",
        metavar="DIR",
        help="directory or hub id with the model's tokenizer and template (unset: what the server names as root)",
    )
    parser.option(
        model,
        "--mode",
        env="DYN_ATTACH_MODE",
        choices=["auto", "tokens", "openai"],
        default="auto",
        help="send tokens, or pass OpenAI's bytes through; auto takes tokens where the server and the tokenizer allow",
    )
    kv = parser.add_argument_group("KV cache")
    parser.option(kv, "--kv-events", metavar="ENDPOINT", help="where the server publishes them: tcp://host:port")
    parser.option(
        kv, "--kv-replay", metavar="ENDPOINT", help="where it replays those that were missed: tcp://host:port"
    )
    parser.option(kv, "--kv-topic", metavar="TOPIC", default="", help="the topic it publishes them under (unset: any)")
    parser.option(
        kv,
        "--block-size",
        metavar="N",
        type=positive_int,
        help="tokens of a KV block, for a server whose /metrics do not tell",
    )
    access = parser.add_argument_group("access")
    parser.option(
        access,
        "--api-key",
        env="DYN_ATTACH_API_KEY",
        metavar="KEY",
        default="",
        help="the server's key, if it wants one",
    )
    parser.option(access, "--tls-ca", metavar="FILE", help="authority that the server's certificate is checked against")
    parser.option(access, "--tls-verify", type=bool, default=True, help="check the server's certificate")
    add_worker_options(parser)
    args = parser.parse(argv)
    if not args.url:
        parser.error("URL: is required: the address of a running server, such as http://127.0.0.1:8000")
    try:
        options = AttachOptions(
            url=server_url(args.url),
            served_model=args.served_model,
            model_name=args.model_name,
            model_path=args.model_path,
            mode=args.mode,
            kv_events=_zmq_endpoint("--kv-events", args.kv_events),
            kv_replay=_zmq_endpoint("--kv-replay", args.kv_replay),
            kv_topic=args.kv_topic,
            block_size=args.block_size,
            api_key=args.api_key or None,
            tls_ca=args.tls_ca,
            tls_verify=args.tls_verify,
            worker=worker_options(args),
        )
        tls_context(options)
    except ValueError as e:
        parser.error(str(e))
    if options.kv_replay and not options.kv_events:
        parser.error("--kv-replay: needs --kv-events too: only what was missed is replayed")
    return options


def server_url(text: str) -> str:
    """The base of the server's paths. Raises ValueError."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as e:
        raise ValueError(f"URL: {text!r}: {e}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"URL: {text!r} is not the address of a server, such as http://127.0.0.1:8000")
    if port is None and parts.netloc.endswith(":"):
        raise ValueError(f"URL: {text!r} has no port after its colon")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def tls_context(options: AttachOptions) -> ssl.SSLContext | None:
    """How the server's certificate is checked; None for plain HTTP. Raises ValueError."""
    if not options.url.startswith("https://"):
        if options.tls_ca or not options.tls_verify:
            raise ValueError("--tls-ca and --no-tls-verify are for a server at https://")
        return None
    try:
        context = ssl.create_default_context(cafile=options.tls_ca)
    except OSError as e:  # ssl.SSLError is one
        raise ValueError(f"--tls-ca: {options.tls_ca}: {e.strerror or e}") from None
    if not options.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _zmq_endpoint(flag: str, text: str | None) -> str | None:
    if not text:
        return None
    if text.startswith("ipc://"):
        return text
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if not text.startswith("tcp://") or not host or not port.isdigit():
        raise ValueError(f"{flag}: {text!r} is not tcp://host:port, as the server's --kv-events-config has it")
    return text
