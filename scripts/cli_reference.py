#!/usr/bin/env python3
"""Which options has each program? Writes docs/reference/cli.md from the parsers themselves.

usage: scripts/cli_reference.py [--check]

With --check nothing is written; the exit status is 1 if the page is not up to date.
"""

import argparse
import contextlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "cli.md"

PROGRAMS = {
    "dynamo run": ["dynamo.cli.main", "run"],
    "dynamo doctor": ["dynamo.cli.main", "doctor"],
    "dynamo demo-model": ["dynamo.cli.main", "demo-model"],
    "dynamo event-keys": ["dynamo.cli.main", "event-keys"],
    "dynamo replay": ["dynamo.cli.main", "replay"],
    "python -m dynamo.frontend": ["dynamo.frontend"],
    "python -m dynamo.vllm": ["dynamo.vllm"],
    "python -m dynamo.mocker": ["dynamo.mocker"],
    "python -m dynamo.echo": ["dynamo.echo"],
    "python -m dynamo.attach": ["dynamo.attach"],
    "python -m dynamo.router": ["dynamo.router"],
    "python -m dynamo.indexer": ["dynamo.indexer"],
    "python -m dynamo.select_service": ["dynamo.select_service"],
    "python -m dynamo.slot_tracker": ["dynamo.slot_tracker"],
}
HEAD = """\
# Command lines

Written by `make docs` from the parsers; do not edit.

An option's environment variable stands in brackets; the option wins over the variable, the variable over the default.
An unknown option ends the program with status 2 and names the nearest known one. `dynamo frontend`, `dynamo vllm`,
`dynamo mocker`, `dynamo echo`, `dynamo attach`, `dynamo router`, `dynamo indexer`, `dynamo select-service` and
`dynamo slot-tracker` are the same as their `python -m` forms.
"""


class _GotParserError(Exception):
    """Carries the parser out of a program that was about to print its help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(module: str, *words: str) -> argparse.ArgumentParser:
    """The parser that a program would print the help of."""

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _GotParserError(parser)

    with mock.patch.object(argparse.ArgumentParser, "print_help", catch), _argv(module, *words, "--help"):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except _GotParserError as e:
            return e.parser
    raise AssertionError(f"{module} has no --help")


@contextlib.contextmanager
def _argv(*words: str) -> Iterator[None]:
    with mock.patch.object(sys, "argv", list(words)):
        yield


def render(title: str, parser: argparse.ArgumentParser) -> str:
    """One program's section."""
    lines = [f"## `{title}`", "", (parser.description or "").strip(), ""]
    if parser.usage:
        lines += ["```", (parser.usage % {"prog": title}).strip(), "```", ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and "--help" not in a.option_strings]
        if actions:
            lines += [f"**{group.title}**", "", "| option | meaning |", "|---|---|"]
            lines += [f"| {_names(a)} | {_help(a)} |" for a in actions]
            lines.append("")
    return "\n".join(lines)


def _names(action: argparse.Action) -> str:
    metavar: Any = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if isinstance(action, argparse.BooleanOptionalAction):
        metavar = ""
    if not action.option_strings:
        return f"`{metavar}`"
    return ", ".join(f"`{flag}`" for flag in action.option_strings) + (f" `{metavar}`" if metavar else "")


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%").replace("|", "\\|")
    return (
        text if action.choices is None or action.metavar else f"{text} One of: {', '.join(map(str, action.choices))}."
    )


def page() -> str:
    """The whole page. Variables that change defaults are taken away first."""
    for name in [name for name in os.environ if name.startswith("DYN_")]:
        del os.environ[name]
    sections = [render(title, parser_of(*program)) for title, program in PROGRAMS.items()]
    return HEAD + "\n" + "\n".join(sections).rstrip() + "\n"


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not up to date: run make docs")
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
