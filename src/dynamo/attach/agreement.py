"""Do the server and the model directory at hand make the same tokens of the same text?

If they do not, sending tokens would give answers to prompts that nobody wrote, with no error anywhere. So they are
compared before the first request, on text that tells tokenizers and templates apart.
"""

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from dynamo.attach.server import OpenAIServer
from dynamo.llm.chat_template import ChatTemplate
from dynamo.llm.tokenizer import Tokenizer
from dynamo.runtime.errors import InvalidArgument

SAMPLE = "Hello, world!  The naïve café paid 1234567.89 € for 東京 and 🦙\n\tdef f(x): return x**2"
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 東京?"},
    {"role": "assistant", "content": "A city."},
    {"role": "user", "content": "  And 🦙?\n"},
]


class Agreement(msgspec.Struct, frozen=True):
    """`differs` says in what they differ, `unknown` why it could not be compared; both None: they agree."""

    differs: str | None = None
    unknown: str | None = None


class _Local(msgspec.Struct, frozen=True):
    """What the directory makes of the sample and of the chat; None without a template that takes it."""

    text: list[int]
    chat: list[int] | None


async def compare(server: OpenAIServer, model: str, directory: Path, template: str | None = None) -> Agreement:
    """Compare text and a chat's prompt, by the server's `/tokenize` (vLLM and SGLang have one).

    `template` is a file to use instead of the directory's.

    Raises:
        CannotConnect, Disconnected, ConnectionTimeout: the server does not answer.
    """
    try:
        ours = await asyncio.to_thread(_local, directory, Path(template) if template else None)
    except InvalidArgument as e:
        return Agreement(differs=e.message)
    theirs = await _tokenize(server, {"model": model, "prompt": SAMPLE, "add_special_tokens": False})
    if theirs is None:
        return Agreement(unknown=f"{server.url} has no /tokenize")
    if theirs != ours.text:
        return Agreement(
            differs=f"another tokenizer: of {SAMPLE[:13]!r} the server makes {theirs[:6]}, {directory} {ours.text[:6]}"
        )
    if ours.chat is None:
        return Agreement(unknown=f"{directory} has no chat template that could be compared")
    chat = {"model": model, "messages": MESSAGES, "add_generation_prompt": True, "add_special_tokens": False}
    theirs = await _tokenize(server, chat)
    if theirs is None:
        return Agreement(unknown="the server does not tell what it makes of a chat")
    if theirs != ours.chat:
        return Agreement(differs="another chat template: give the server's with --custom-jinja-template")
    return Agreement()


def _local(directory: Path, template: Path | None) -> _Local:
    tokenizer = Tokenizer.load(directory)
    chat_template = ChatTemplate.load(directory, template)
    chat = None
    if chat_template is not None:
        try:
            chat = tokenizer.encode(chat_template.render(MESSAGES, add_generation_prompt=True))
        except InvalidArgument:
            chat = None  # a template that wants other messages; it will say so to those who send such
    return _Local(tokenizer.encode(SAMPLE), chat)


async def _tokenize(server: OpenAIServer, body: dict[str, Any]) -> list[int] | None:
    reply = await server.post("/tokenize", body)
    if reply.status != 200:
        return None
    try:
        return msgspec.convert(reply.json()["tokens"], list[int])
    except (ValueError, KeyError, TypeError):
        return None
