"""How does one talk to the served model in a terminal?

Ctrl-C stops the answer, Ctrl-D ends the chat. A line that ends with a backslash goes on in the next. The arrow keys
bring back earlier lines. What was said is kept for this session only.
"""

import contextlib
import sys
import time
from typing import Any

from rich.console import Console

from dynamo.cli.client import ApiError, ChatClient

HELP = """\
/system TEXT   set the system prompt (without TEXT: show it) and keep the conversation
/clear         forget the conversation
/help          this
/quit          leave (so does Ctrl-D)
Ctrl-C         stop the answer"""
PROMPT = "\x01\x1b[1;36m\x02you ▸\x01\x1b[0m\x02 "  # \x01 \x02 tell readline which characters take no room
PLAIN_PROMPT = "you ▸ "
CONTROLS = {c: None for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\n\t"}
"""Characters that could steer the terminal; a model must not be able to."""


class Chat:
    """One conversation. `fields` go into every request (max_tokens, temperature, ...)."""

    def __init__(self, client: ChatClient, console: Console, fields: dict[str, Any], system: str | None = None) -> None:
        self.client = client
        self.console = console
        self.fields = fields
        self.system = system
        self.turns: list[dict[str, str]] = []

    def run(self) -> None:
        """Talk until the user leaves."""
        with contextlib.suppress(ImportError):  # a Python without readline: no history, all else works
            import readline  # noqa: F401 - imported for what it does to input()
        self.console.print(f"[bold]{self.client.model}[/bold]  [dim]/help lists commands, Ctrl-D ends[/dim]")
        while True:
            try:
                text = self._read().strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print("\n[dim](Ctrl-D ends the chat)[/dim]")
                continue
            if text in ("/quit", "/exit"):
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._answer(text)

    def _read(self) -> str:
        prompt = PROMPT if self.console.is_terminal and sys.stdin.isatty() else PLAIN_PROMPT
        lines = [input(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input("    … "))
        return "\n".join(lines)

    def _command(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == "/help":
            self.console.print(HELP, markup=False, highlight=False)
        elif word == "/clear":
            self.turns.clear()
            self.console.print("[dim]forgotten[/dim]")
        elif word == "/system":
            if rest.strip():
                self.system = rest.strip()
            self.console.print(f"system prompt: {self.system or 'none'}", style="dim", markup=False, highlight=False)
        else:
            self.console.print(f"unknown command {word}; /help lists them", style="red", markup=False)

    def _answer(self, text: str) -> None:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [*self.turns, {"role": "user", "content": text}]
        said: list[str] = []
        started = time.monotonic()
        first: float | None = None
        note = ""
        try:
            with contextlib.closing(self.client.stream(messages, **self.fields)) as pieces:
                for piece in pieces:
                    first = first or time.monotonic()
                    said.append(piece)
                    self._write(piece)
        except KeyboardInterrupt:
            note = "stopped"
        except (ApiError, OSError) as e:
            self.console.print()
            self.console.print(str(e), style="red", markup=False, highlight=False)
            if not said:
                return  # the question was not taken: it is not part of the conversation
            note = "broken off"
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(said)}]
        self.console.print(f"\n[dim]{self._summary(started, first, note)}[/dim]", highlight=False)

    def _write(self, piece: str) -> None:
        self.console.file.write(piece.translate(CONTROLS))
        self.console.file.flush()

    def _summary(self, started: float, first: float | None, note: str) -> str:
        words = [note] if note else []
        if self.client.usage is not None and first is not None:
            tokens = self.client.usage.completion_tokens
            spent = time.monotonic() - first
            words += [f"{tokens} tokens", f"first after {(first - started) * 1000:.0f} ms"]
            if tokens > 1 and spent > 0:
                words.append(f"{(tokens - 1) / spent:.0f} tokens/s")
        return "(" + ", ".join(words or ["no answer"]) + ")"
