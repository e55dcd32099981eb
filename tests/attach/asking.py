"""How do tests ask a server, or a frontend, as any client would?"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

PATIENCE_S = 15.0


async def post(url: str, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
    """Status and body of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + path, data=data, headers={"Content-Type": "application/json", **headers}) as response,
    ):
        return response.status, await response.read()


async def get(url: str, path: str) -> bytes:
    """The body of a GET."""
    async with aiohttp.ClientSession() as session, session.get(url + path) as response:
        return await response.read()


async def until(true: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Wait for what no event tells of: the state of another process, or of its socket."""
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def chat(content: str = "Hello there", model: str = "tiny", **fields: Any) -> dict[str, Any]:
    """A chat request, greedy."""
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def events(body: bytes) -> list[Any]:
    """The JSON of every data event but [DONE]."""
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(body: bytes) -> str:
    """The text of a chat's answer, streamed or not."""
    if body.startswith(b"data: "):
        return "".join(c["delta"].get("content") or "" for event in events(body) for c in event["choices"])
    return str(json.loads(body)["choices"][0]["message"]["content"])
