"""What server is that: which engine, which model, which cache?"""

import logging
from typing import Any

import msgspec

from dynamo.attach.load import Metrics, read_metrics
from dynamo.attach.server import OpenAIServer, error_words
from dynamo.runtime.errors import DynamoException, WorkerUnavailable

log = logging.getLogger(__name__)

ENGINE_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}


class ServedModel(msgspec.Struct, frozen=True):
    """One entry of /v1/models. `parent` is set for an adapter."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    owned_by: str | None = None


class Identity(msgspec.Struct, frozen=True):
    """What must not change behind an address."""

    model: str
    root: str | None

    def __str__(self) -> str:
        return f"{self.model} ({self.root})" if self.root and self.root != self.model else self.model


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. Sizes in tokens unless the name says blocks; None is what the server does not tell."""

    url: str
    engine: str
    version: str | None
    identity: Identity
    other_names: list[str]
    adapters: list[str]
    max_model_len: int | None
    block_size: int | None
    total_blocks: int | None
    prefix_caching: bool | None
    ranks: int
    has_metrics: bool
    started_at: float | None
    tokenizer: str | None
    """Where the server says its tokenizer is from: a path on its machine, or a hub id."""

    @property
    def model(self) -> str:
        """What the server calls the model."""
        return self.identity.model

    def __str__(self) -> str:
        """One line."""
        name = ENGINE_NAMES.get(self.engine, "an OpenAI server of an unknown engine")
        blocks = "KV block size unknown"
        if self.block_size:
            blocks = f"KV blocks of {self.block_size} tokens"
            if self.total_blocks:
                blocks = f"{self.total_blocks} {blocks}"
        caching = {True: "on", False: "off", None: "unknown"}[self.prefix_caching]
        length = f"max_model_len {self.max_model_len}" if self.max_model_len else "max_model_len unknown"
        ranks = "" if self.ranks == 1 else f", {self.ranks} data parallel ranks"
        version = f" {self.version}" if self.version else ""
        return f"{name}{version} serving {self.identity}, {length}, {blocks}, prefix caching {caching}{ranks}"


class NotAServer(ValueError):  # noqa: N818 - says what is the matter
    """Something answers, but it is no OpenAI server, or not one that can be used so."""


async def served_models(server: OpenAIServer, timeout_s: float = 10.0) -> list[ServedModel]:
    """The entries of /v1/models.

    Raises:
        NotAServer: it answers something else, or wants another key.
        CannotConnect, Disconnected, ConnectionTimeout, WorkerUnavailable: it does not answer, or not yet.
    """
    reply = await server.get("/v1/models", timeout_s)
    where = f"{server.url}/v1/models"
    if reply.status in (401, 403):
        raise NotAServer(f"{where} answers {reply.status}: give the server's key with --api-key")
    if reply.status >= 500:
        raise WorkerUnavailable(f"{where} answers {reply.status} {error_words(reply.body).message}".rstrip())
    if reply.status != 200:
        raise NotAServer(f"{where} answers {reply.status}: is this an OpenAI server?")
    try:
        return msgspec.convert(reply.json()["data"], list[ServedModel])
    except (ValueError, TypeError, KeyError) as e:
        raise NotAServer(f"{where} does not list models: {e}") from None


def choose_model(models: list[ServedModel], wanted: str | None) -> ServedModel:
    """The model to serve: the wanted one, or the only one (an engine may list it under several names).

    Raises:
        NotAServer: it is not there, or which one is meant is not said.
    """
    bases = [model for model in models if model.parent is None]
    names = ", ".join(model.id for model in bases) or "none"
    if wanted is not None:
        found = next((model for model in bases if model.id == wanted), None)
        if found is None:
            raise NotAServer(f"--served-model: the server has no model {wanted!r}, but {names}")
        return found
    if not bases:
        raise NotAServer("the server lists no model")
    if len({model.root or model.id for model in bases}) > 1:
        raise NotAServer(f"the server has several models: say which with --served-model ({names})")
    return bases[0]


async def probe(server: OpenAIServer, wanted: str | None = None) -> ServerFacts:
    """Ask the server about itself.

    Raises:
        NotAServer: see `served_models` and `choose_model`.
        CannotConnect, Disconnected, ConnectionTimeout: it does not answer.
    """
    models = await served_models(server)
    model = choose_model(models, wanted)
    metrics = await fetch_metrics(server)
    version = _text(await _json(server, "/version"), "version")
    info: dict[str, Any] = {}
    if model.owned_by == "sglang" or version is None:
        info = await _sglang_info(server)
    engine = "sglang" if info else "vllm" if version or model.owned_by == "vllm" else "unknown"
    known = metrics or Metrics()
    if info:
        known = _sglang_cache(info, known)
    root = model.root if not info else _text(info, "model_path") or model.root
    return ServerFacts(
        url=server.url,
        engine=engine,
        version=version or _text(info, "version"),
        identity=Identity(model.id, root),
        other_names=[other.id for other in models if other.parent is None and other.id != model.id],
        adapters=[other.id for other in models if other.parent is not None],
        max_model_len=model.max_model_len,
        block_size=known.block_size,
        total_blocks=known.total_blocks,
        prefix_caching=known.prefix_caching,
        ranks=max(len(known.ranks), _positive(info, "dp_size") or 1),
        has_metrics=metrics is not None,
        started_at=known.started_at,
        tokenizer=_text(info, "tokenizer_path") or root,
    )


async def fetch_metrics(server: OpenAIServer) -> Metrics | None:
    """What /metrics tells; None if there are none. Raises CannotConnect, Disconnected, ConnectionTimeout."""
    reply = await server.get("/metrics")
    if reply.status != 200 or "json" in reply.content_type or "html" in reply.content_type:
        return None
    return read_metrics(reply.body.decode(errors="replace"))


async def _json(server: OpenAIServer, path: str) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        reply = await server.get(path)
        found = reply.json() if reply.status == 200 else {}
    except (DynamoException, ValueError) as e:
        log.debug("%s tells nothing: %s", path, e)
        return {}
    return found if isinstance(found, dict) else {}


async def _sglang_info(server: OpenAIServer) -> dict[str, Any]:
    """SGLang's own account of itself; the second path is that of older versions."""
    for path in ("/server_info", "/get_server_info"):
        info = await _json(server, path)
        if "model_path" in info:
            return info
    return {}


def _sglang_cache(info: dict[str, Any], metrics: Metrics) -> Metrics:
    """Pages of SGLang are blocks; a rank's tokens are told by the scheduler."""
    page, tokens = _positive(info, "page_size"), _positive(info, "max_total_num_tokens")
    metrics.block_size = page
    metrics.total_blocks = tokens // page if page and tokens else None
    if isinstance(off := info.get("disable_radix_cache"), bool):
        metrics.prefix_caching = not off
    return metrics


def _text(found: dict[str, Any], name: str) -> str | None:
    value = found.get(name)
    return value if isinstance(value, str) and value else None


def _positive(found: dict[str, Any], name: str) -> int | None:
    value = found.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
