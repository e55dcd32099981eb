"""A server that speaks vLLM's or SGLang's protocol over real sockets, and fails in every way a test asks for.

It repeats the prompt's tokens, one an event. What it cannot stand in for (vLLM's own answers, its cache events) is
tested against vLLM itself.
"""

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from dynamo.llm.chat_template import ChatTemplate
from dynamo.llm.tokenizer import Tokenizer

METRICS = """\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
process_start_time_seconds {started}
vllm:num_requests_running{{engine="0",model_name="tiny"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="tiny"}} 2.0
vllm:num_requests_waiting_by_reason{{engine="0",model_name="tiny",reason="capacity"}} 7.0
vllm:kv_cache_usage_perc{{engine="0",model_name="tiny"}} 0.25
vllm:cache_config_info{{block_size="16",enable_prefix_caching="{caching}",engine="0",num_gpu_blocks="400"}} 1.0
"""

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class PretendServer:
    """Listens on a port of its own. Every attribute may be changed while it runs."""

    def __init__(self, directory: Path) -> None:
        self.model = "tiny"
        self.root = str(directory)
        self.others: list[dict[str, Any]] = []
        self.health = 200
        self.models_status = 200
        self.api_key: str | None = None
        self.scale_out = True
        self.returns_ids = True
        self.started = 1000.5
        self.running = 3
        self.caching = True
        self.tokenizer_shift = 0
        self.answer: Answer | None = None  # instead of a request's usual answer
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self._tokenizer = Tokenizer.load(directory)
        self._template = ChatTemplate.load(directory)
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; on the same port as before, if there was one."""
        app = web.Application(client_max_size=64 << 20, middlewares=[self._guard])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        for path in ("/inference/v1/generate", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._infer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close the port and break all connections, as a killed process does."""
        runner, self._runner = self._runner, None
        if runner is not None:
            if runner.server is not None:
                for connection in list(runner.server.connections):
                    if connection.transport is not None:
                        connection.transport.abort()
            await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        guarded = request.path.startswith(("/v1", "/inference"))
        if self.api_key and guarded and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _models(self, request: web.Request) -> web.Response:
        if self.models_status != 200:
            return web.Response(status=self.models_status, text="no")
        entry = {"id": self.model, "object": "model", "owned_by": "vllm", "root": self.root, "parent": None}
        return web.json_response({"object": "list", "data": [entry | {"max_model_len": 512}, *self.others]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _metrics(self, request: web.Request) -> web.Response:
        text = METRICS.format(started=self.started, running=float(self.running), caching=self.caching)
        return web.Response(text=text)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            assert self._template is not None
            text = self._template.render(body["messages"], add_generation_prompt=body["add_generation_prompt"])
        else:
            text = body["prompt"]
        tokens = [token + self.tokenizer_shift for token in self._tokenizer.encode(text)]
        return web.json_response({"tokens": tokens, "count": len(tokens), "max_model_len": 512})

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.seen.append((request.path, {k.lower(): v for k, v in request.headers.items()}, raw))
        body = json.loads(raw)
        self.in_flight += 1
        self.idle.clear()
        try:
            if body.get("model") != self.model:
                return web.json_response(
                    {"error": {"message": f"no model {body.get('model')}", "code": 404}}, status=404
                )
            if self.answer is not None and body.get("request_id") != "dynamo-attach-trial":
                return await self.answer(request, body)
            if request.path == "/v1/chat/completions":
                return web.Response(body=b'{ "odd" :  "bytes", "n": 1.50 }', content_type="application/json")
            if request.path == "/inference/v1/generate":
                if not self.scale_out:
                    return web.json_response({"error": {"message": "Scale-out endpoints are disabled."}}, status=403)
                return await self.repeat(request, body["token_ids"], body["sampling_params"]["max_tokens"])
            return await self.repeat(request, body["prompt"], body["max_tokens"])
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()

    async def repeat(self, request: web.Request, prompt: list[int], max_tokens: int) -> web.StreamResponse:
        """The prompt's tokens over and over, one an event, in the form of either endpoint."""
        response = await self.events(request)
        for i in range(max_tokens):
            choice: dict[str, Any] = {"index": 0, "text": "?", "finish_reason": None, "stop_reason": None}
            if self.returns_ids or request.path != "/v1/completions":
                choice["token_ids"] = [prompt[i % len(prompt)]]
            if i == max_tokens - 1:
                choice["finish_reason"] = "length"
            await self.send(response, {"choices": [choice], "usage": None})
        details = {"cached_tokens": 5}
        await self.send(response, {"choices": [], "usage": {"prompt_tokens_details": details}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def events(self, request: web.Request) -> web.StreamResponse:
        """A stream of events, begun."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        return response

    async def send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
