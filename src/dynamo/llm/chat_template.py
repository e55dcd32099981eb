"""Which prompt do these messages make, by the model's own chat template?

Templates are Jinja2, rendered in the environment that Hugging Face `transformers` gives them, so that the prompt is
the same to the byte: sandboxed and immutable, `trim_blocks` and `lstrip_blocks`, `break` and `continue`,
`{% generation %}`, `raise_exception`, `strftime_now`, and a `tojson` that neither sorts nor escapes.
"""

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dynamo.llm.chat_messages import shape_messages
from dynamo.llm.content_format import ContentFormat, content_format
from dynamo.llm.tokenizer_config import read_json, read_tokenizer_config
from dynamo.runtime.errors import InvalidArgument

RENDER_LIMIT_S = 5.0  # a thousand messages take milliseconds; what takes this long would never end
_CLOCK_EVERY = 256  # pieces of output between two looks at the clock
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # its trailing space shows whether the template strips


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks the assistant's text for training; here it just renders."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


class TemplateRefusalError(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusalError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the machine's local time, as in transformers


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_DICT_ATTRIBUTES = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """`message.role` means the attribute first and the key then; for a dict which of them it is can be told at once."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()


@dataclass(frozen=True)
class _Compiled:
    origin: str
    source: str
    template: jinja2.Template
    content: ContentFormat
    knows_developer: bool


def _compile(origin: str, source: str) -> _Compiled:
    try:
        tree = _ENVIRONMENT.parse(source)
        template = _ENVIRONMENT.from_string(source)
        # Jinja chains the template's globals to the environment's and walks that chain at every rendering, which is
        # half of what a short chat's rendering costs. Ours do not change.
        template.globals = dict(template.globals)
    except jinja2.TemplateSyntaxError as e:
        raise InvalidArgument(f"the chat template {origin} is not valid Jinja, line {e.lineno}: {e.message}") from e
    knows_developer = "'developer'" in source or '"developer"' in source
    return _Compiled(origin, source, template, content_format(tree), knows_developer)


class ChatTemplate:
    """A model's chat templates, compiled: `default`, and perhaps others by name such as `tool_use`.

    `tokens` are the named special tokens (`bos_token`, …) that every template sees.
    """

    def __init__(self, sources: Mapping[str, tuple[str, str]], tokens: Mapping[str, str]) -> None:
        """`sources` maps a template's name to where it is from and its text. Raises InvalidArgument for bad Jinja."""
        self._templates = {name: _compile(origin, source) for name, (origin, source) in sources.items()}
        self._tokens = dict(tokens)

    @classmethod
    def load(cls, directory: Path, custom: Path | None = None) -> "ChatTemplate | None":
        """The templates of a model directory, None if it has none.

        In order, the first that is there: `custom`; `chat_template.jinja` with `additional_chat_templates/*.jinja`;
        `chat_template` in `tokenizer_config.json` (a string, or a list of `{"name", "template"}`);
        `chat_template.json`. Raises InvalidArgument naming the file, and the line for bad Jinja.
        """
        directory = Path(directory)
        config = read_tokenizer_config(directory)
        sources = _sources(directory, config.raw, Path(custom) if custom else None)
        return cls(sources, config.named) if sources else None

    @property
    def names(self) -> list[str]:
        """Names of the templates that are there."""
        return list(self._templates)

    def source(self, with_tools: bool = False) -> str:
        """The text of the template that requests use."""
        return self._pick(with_tools).source

    def wants(self, with_tools: bool = False) -> ContentFormat:
        """Whether that template takes content as `string` or as a list of parts (`openai`)."""
        return self._pick(with_tools).content

    def _pick(self, with_tools: bool) -> _Compiled:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        found = self._templates.get(name)
        if found is None:
            raise InvalidArgument(f"the model has chat templates {sorted(self._templates)} but none named default")
        return found

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a request's messages, which are first given the shape that the template wants.

        See `dynamo.llm.chat_messages.shape_messages`. `kwargs` are further names for the template and win over the
        special tokens. Raises InvalidArgument when the template refuses the messages or fails on them.
        """
        chosen = self._pick(tools is not None)
        shaped = shape_messages(messages, chosen.content, chosen.knows_developer)
        return self.render_as_is(shaped, tools, add_generation_prompt, continue_final_message, documents, **kwargs)

    def render_as_is(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """As `render`, with the messages as they are: what `transformers`' `apply_chat_template` gives for them."""
        chosen = self._pick(tools is not None)
        if not messages:
            raise InvalidArgument("messages is empty: give at least one message", "messages")
        if "chat_template" in kwargs or "messages" in kwargs:
            raise InvalidArgument("the chat template's arguments must not name chat_template or messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidArgument(
                "continue_final_message and add_generation_prompt exclude each other: set one of them to false",
                "continue_final_message",
            )
        final = ""
        if continue_final_message:
            messages, final = _mark_end(messages)
        names = {
            **self._tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _run(chosen, names)
        return _cut_at_mark(text, final) if continue_final_message else text


def _run(chosen: _Compiled, names: dict[str, Any]) -> str:
    try:
        return _joined_by_deadline(chosen.template.generate(names))
    except TemplateRefusalError as e:
        # The author's own words for the caller.
        raise InvalidArgument(f"{e.message} (chat template {chosen.origin}, line {_line(e)})", "messages") from e
    except InvalidArgument:
        raise
    except Exception as e:
        raise InvalidArgument(
            f"the chat template {chosen.origin} failed on these messages at line {_line(e)}: {type(e).__name__}: {e}",
            "messages",
        ) from e


def _joined_by_deadline(pieces: Iterator[str]) -> str:
    made = list(islice(pieces, _CLOCK_EVERY))
    if len(made) < _CLOCK_EVERY:
        return "".join(made)
    deadline = time.monotonic() + RENDER_LIMIT_S
    while batch := list(islice(pieces, _CLOCK_EVERY)):
        made += batch
        if len(batch) == _CLOCK_EVERY and time.monotonic() > deadline:
            raise InvalidArgument(
                f"the chat template took more than {RENDER_LIMIT_S:g} s on these messages", "messages"
            )
    return "".join(made)


def _line(error: BaseException) -> int | str:
    """The template line an error came from: jinja2 rewrites the traceback to point into the template."""
    line: int | str = "?"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _mark_end(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Messages with a mark after the last one's text, and that text."""
    marked = [copy.deepcopy(dict(message)) for message in messages]
    content = marked[-1].get("content")
    if isinstance(content, str):
        marked[-1]["content"] = content + _CONTINUE_MARK
        return marked, content
    for part in reversed(content or []):
        if "text" in part:
            text = str(part["text"])
            part["text"] = text + _CONTINUE_MARK
            return marked, text
    raise InvalidArgument("continue_final_message is set but the last message has no text to continue", "messages")


def _cut_at_mark(text: str, final: str) -> str:
    mark = _CONTINUE_MARK.strip()
    if mark not in text or final.strip() not in text:
        raise InvalidArgument(
            "continue_final_message is set but the chat template does not show the last message's text as it is",
            "continue_final_message",
        )
    at = text.rindex(mark)
    # Where the template strips the message, its trailing space is gone from the mark, and goes from the text too.
    return text[:at] if text.startswith(_CONTINUE_MARK, at) else text[:at].rstrip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidArgument(f"cannot read the chat template {path}: {e}") from e


def _sources(directory: Path, config: dict[str, Any], custom: Path | None) -> dict[str, tuple[str, str]]:
    if custom is not None:
        return {"default": (str(custom), _read(custom))}
    files: dict[str, Path] = {}
    if (directory / "chat_template.jinja").exists():
        files["default"] = directory / "chat_template.jinja"
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        files[path.stem] = path
    if files:
        return {name: (path.name, _read(path)) for name, path in files.items()}
    found = _named_templates(config.get("chat_template"), "tokenizer_config.json")
    if found:
        return found
    legacy = directory / "chat_template.json"
    if legacy.exists():
        value = read_json(legacy)
        return _named_templates(value.get("chat_template") if isinstance(value, dict) else value, legacy.name)
    return {}


def _named_templates(value: Any, file: str) -> dict[str, tuple[str, str]]:
    """A template as text, as a list of `{"name", "template"}`, or as an object name → text."""
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": (f"of {file}", value)}
    try:
        pairs = value.items() if isinstance(value, dict) else [(entry["name"], entry["template"]) for entry in value]
        return {str(name): (f"{name} of {file}", str(source)) for name, source in pairs}
    except (TypeError, KeyError) as e:
        raise InvalidArgument(f"chat_template in {file} must be text or a list of name and template") from e
