"""How will requests be sent to this server, and why so?"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from dynamo.attach.agreement import compare
from dynamo.attach.args import AttachOptions
from dynamo.attach.dialects import Dialect, dialects_of
from dynamo.attach.probe import ServerFacts
from dynamo.attach.server import OpenAIServer, error_words
from dynamo.attach.sse import all_events
from dynamo.llm.hub import fetch_model
from dynamo.llm.protocols.engine import PreprocessedRequest, SamplingOptions, StopConditions
from dynamo.runtime.errors import DynamoException

TRIAL_TIMEOUT_S = 60.0  # for one token; a busy server lets it wait behind others


_ASKED_FOR = "asked for (--mode openai); routers see no tokens, so they balance by load"


@dataclass(frozen=True, slots=True)
class Plan:
    """`dialect` and `directory` are set where tokens are sent; `warnings` are what the operator must know."""

    why: str
    dialect: Dialect | None = None
    directory: Path | None = None
    offers_tokens: str | None = None
    """Which token endpoint the server offers, used or not."""
    warnings: tuple[str, ...] = ()

    @property
    def sends_tokens(self) -> bool:
        """Whether frontends tokenize."""
        return self.dialect is not None

    def __str__(self) -> str:
        offered = f"tokens in and out by {self.offers_tokens}" if self.offers_tokens else "no tokens in and out"
        return f"{offered}; mode {'tokens' if self.sends_tokens else 'openai'}: {self.why}"


class CannotSendTokens(ValueError):  # noqa: N818 - says what is the matter
    """Why tokens cannot be sent to this server."""


async def make_plan(server: OpenAIServer, facts: ServerFacts, options: AttachOptions) -> Plan:
    """Choose the mode.

    Raises:
        CannotSendTokens: `--mode tokens` was asked for and cannot be.
        CannotConnect, Disconnected, ConnectionTimeout: the server does not answer.
    """
    dialect: Dialect | None = None
    try:
        dialect = await _try_dialects(server, facts)
        if options.mode == "openai":
            return Plan(_ASKED_FOR, offers_tokens=dialect.name)
        directory = await _directory(facts, options)
        agreement = await compare(server, facts.model, directory, options.worker.custom_jinja_template)
        if agreement.differs:
            raise CannotSendTokens(agreement.differs)
    except CannotSendTokens as e:
        if options.mode == "openai":
            return Plan(_ASKED_FOR)
        if options.mode == "tokens":
            raise CannotSendTokens(f"--mode tokens: {e}") from None
        why = f"{e}; requests pass through as they are, and routers balance by load"
        return Plan(
            why, offers_tokens=None if dialect is None else dialect.name, warnings=(f"tokens are not sent: {e}",)
        )
    warnings = []
    if agreement.unknown:
        warnings.append(f"whether {directory} is the server's tokenizer is not verified: {agreement.unknown}")
    if facts.adapters:
        names = ", ".join(facts.adapters)
        warnings.append(f"the adapters {names} are not offered in this mode; --mode openai offers them")
    compared = "unverified" if agreement.unknown else "verified"
    return Plan(
        f"frontends tokenize with {directory} ({compared}), so routers see prompts",
        dialect,
        directory,
        dialect.name,
        tuple(warnings),
    )


async def _try_dialects(server: OpenAIServer, facts: ServerFacts) -> Dialect:
    """The first language in which the server makes one token of one token."""
    failures = []
    for dialect in dialects_of(facts.engine, facts.model, facts.max_model_len):
        failure = await _trial(server, dialect, facts.model)
        if failure is None:
            return dialect
        failures.append(f"{dialect.name}: {failure}")
    raise CannotSendTokens(f"the server takes no tokens ({'; '.join(failures)})")


async def _trial(server: OpenAIServer, dialect: Dialect, model: str) -> str | None:
    """Why the server does not speak it, None if it does."""
    request = PreprocessedRequest(
        model, [1], StopConditions(max_tokens=1, ignore_eos=True), SamplingOptions(temperature=0.0)
    )
    body = dialect.body(request, "dynamo-attach-trial")
    reply = await server.post(dialect.path, body, TRIAL_TIMEOUT_S)
    if reply.status != 200:
        return f"{reply.status} {error_words(reply.body).message}"
    if not reply.content_type.startswith("text/event-stream"):
        return "it does not stream"
    reader, made = dialect.reader(request), 0
    try:
        for event in all_events(reply.body):
            output = None if event == b"[DONE]" else reader.read(event)
            made += len(output.token_ids) if output is not None else 0
    except DynamoException as e:
        return e.message
    return None if made == 1 else f"it made {made} tokens where one was asked for"


async def _directory(facts: ServerFacts, options: AttachOptions) -> Path:
    """Where the model's tokenizer is on this machine. Raises CannotSendTokens."""
    source = options.model_path or facts.tokenizer
    if source is None:
        raise CannotSendTokens("the server does not tell where its tokenizer is from: name it with --model-path")
    try:
        directory = Path(await fetch_model(source, ignore_weights=True))
    except DynamoException as e:
        hint = "" if options.model_path else "; name a directory with the tokenizer with --model-path"
        raise CannotSendTokens(f"no tokenizer at hand: {e.message}{hint}") from None
    return await asyncio.to_thread(directory.absolute)
