"""Command lines and environment: one table of options a program, grouped, each with its `DYN_*` variable.

The flag wins over the variable, the variable over the default. A wrong word costs one line on stderr that
names the nearest right one, and exit status 2.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def parse_bool(text: str) -> bool:
    """`1 true yes on` and `0 false no off`, in any case. Raises ValueError for anything else."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{text!r} is not a boolean: use true or false")


def env_bool(name: str, default: bool) -> bool:
    """A boolean environment variable. Raises ValueError naming the variable."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return parse_bool(text)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def env_number(name: str, default: float) -> float:
    """A numeric environment variable. Raises ValueError naming the variable."""
    text = os.environ.get(name)
    if text is None or not text.strip():
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a number") from None


def env_file(environ: Mapping[str, str], name: str) -> Path | None:
    """The file that a variable names, None if it names none. Raises ValueError naming the variable."""
    text = environ.get(name, "")
    if text and not Path(text).is_file():
        raise ValueError(f"{name}: there is no file {text}")
    return Path(text) if text else None


def both_or_neither(first: str, second: str, given: tuple[object, object]) -> None:
    """What two variables give belongs together. Raises ValueError naming both where one is set and the other not."""
    if bool(given[0]) != bool(given[1]):
        raise ValueError(f"{first} and {second} belong together: set both or neither")


def env_seconds(environ: Mapping[str, str], name: str, default: float, *, least: int = 0, whole: bool = False) -> float:
    """A span of at least `least` seconds, and of whole ones if asked. Raises ValueError naming the variable."""
    text = environ.get(name, "").strip() or str(default)
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not (least <= number < float("inf")) or (whole and number != int(number)):
        raise ValueError(f"{name}: {text!r} is not a {'whole ' if whole else ''}number of seconds from {least} up")
    return number


class OptionParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose options also come from the environment and whose errors suggest."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        )
        self._from_env: list[tuple[argparse.Action, str, Callable[[str], Any]]] = []
        self._rare: list[argparse._ArgumentGroup] = []

    def add_rare_group(self, title: str) -> argparse._ArgumentGroup:
        """A group of options that `--help` only mentions; `--help-all` lists them."""
        if not self._rare:
            self.add_argument(
                "--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="list all options, and exit"
            )
        self._rare.append(self.add_argument_group(title))
        return self._rare[-1]

    def format_help(self) -> str:
        """See `ArgumentParser`."""
        shown, self._action_groups = self._action_groups, [g for g in self._action_groups if g not in self._rare]
        try:
            text = super().format_help()
        finally:
            self._action_groups = shown
        counts = [f"{group.title} ({len(group._group_actions)})" for group in self._rare]
        return text + (f"\nmore, listed by --help-all: {', '.join(counts)}\n" if counts else "")

    def format_full_help(self) -> str:
        """The help with the rare options."""
        return super().format_help()

    def option(
        self,
        group: argparse._ArgumentGroup,
        *flags: str,
        help: str,  # noqa: A002 - argparse's word
        env: str | None = None,
        default: Any = None,
        type: Callable[[str], Any] = str,  # noqa: A002 - argparse's word
        choices: Sequence[Any] | None = None,
        **more: Any,
    ) -> None:
        """Add one option. `type=bool` makes a `--x/--no-x` pair; `help=argparse.SUPPRESS` keeps it out of the help."""
        notes = [f"[{env}]"] if env else []
        if default is not None and default != "":
            notes.append(f"(default: {default})")
        text = help if help is argparse.SUPPRESS else " ".join([help, *notes]).replace("%", "%%")
        if type is bool:
            action = group.add_argument(
                *flags, action=argparse.BooleanOptionalAction, default=default, help=text, **more
            )
        else:
            action = group.add_argument(*flags, default=default, type=type, choices=choices, help=text, **more)
        if env:
            self._from_env.append((action, env, parse_bool if type is bool else type))

    def _apply_environment(self, environ: Mapping[str, str]) -> None:
        for action, env, convert in self._from_env:
            text = environ.get(env)
            if text is None:
                continue
            try:
                value = convert(text)
            except (ValueError, argparse.ArgumentTypeError) as e:
                self.error(f"environment variable {env}: {e}")
            if action.choices is not None and value not in action.choices:
                self.error(f"environment variable {env}: {text!r} is not one of {', '.join(map(str, action.choices))}")
            action.default = value
            action.required = False

    def known_flags(self) -> list[str]:
        """Every flag word this parser takes, for suggestions."""
        return [flag for action in self._actions for flag in action.option_strings]

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the whole command line; anything unknown ends the program with a suggestion."""
        namespace, extra = self.parse_known(argv)
        if extra:
            self.unknown(extra[0])
        return namespace

    def parse_known(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """Parse what is known and give back the rest (for engines that take their own flags)."""
        self._apply_environment(os.environ)
        return super().parse_known_args(argv)

    def unknown(self, word: str, more_flags: Sequence[str] = ()) -> NoReturn:
        """End with the nearest known flag to `word`."""
        flag = word.split("=", 1)[0]
        near = difflib.get_close_matches(flag, [*self.known_flags(), *more_flags], n=1, cutoff=0.6)
        self.error(f"unknown argument {flag!r}" + (f"; did you mean {near[0]}?" if near else "; see --help"))

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit status 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)


class _HelpAll(argparse.Action):
    """Print the whole help, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, OptionParser)
        sys.stdout.write(parser.format_full_help())
        raise SystemExit(0)
