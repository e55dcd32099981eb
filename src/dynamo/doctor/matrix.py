"""What is supported? The data file `matrix.toml`, read and checked. Documents and verdicts both come from it."""

import functools
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

FILE = Path(__file__).with_name("matrix.toml")
Status = Literal["supported", "experimental", "unsupported"]
T = TypeVar("T")


class MatrixError(Exception):
    """The data file cannot be read, or does not say what it must."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a check: it is for facts of that `name` (`*`: any other), or from the number `at_least` on."""

    status: Status
    why: str
    name: str = ""
    at_least: str = ""
    what: str = ""
    fix: str = ""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is said of one check. What is `optional` never makes a machine unfit. `upstream`: its matrix's words."""

    title: str
    group: str
    rows: tuple[Row, ...]
    upstream: str = ""
    unit: str = ""
    optional: bool = False
    fix: str = ""

    def named(self, name: str) -> Row:
        """The row of that name, else the row `*`. Raises MatrixError if there is neither."""
        for wanted in (name, "*"):
            for row in self.rows:
                if row.name == wanted:
                    return row
        raise MatrixError(f"{self.title}: no row is named {name!r}, and none *")

    def level(self, number: str) -> Row:
        """The row with the highest `at_least` that a number or version reaches. Raises MatrixError if none is."""
        reached = [row for row in self.rows if row.at_least and numbers(row.at_least) <= numbers(number)]
        if not reached:
            raise MatrixError(f"{self.title}: no row is for {number!r}")
        return max(reached, key=lambda row: numbers(row.at_least))


class Package(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dependency: its range, the module it gives, and the versions at both ends that the tests ran with."""

    name: str
    module: str
    at_least: str
    lowest_run: str
    highest_run: str
    below: str = ""
    extra: str = ""


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the published matrix that no program can check on a user's machine."""

    what: str
    status: Status
    why: str
    upstream: str = ""


class Matrix:
    """The file's content. A malformed part spoils only what asks for it."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def rule(self, check: str) -> Rule:
        """What is said of a check. Raises MatrixError naming what is wrong."""
        return self._part(("check", check), Rule)

    def rules(self) -> dict[str, Rule]:
        """All checks, in the file's order. Raises MatrixError."""
        return {name: self.rule(name) for name in self._part(("check",), dict[str, Any])}

    @functools.cached_property
    def packages(self) -> tuple[Package, ...]:
        """Dependencies of the core and of each extra. Raises MatrixError."""
        return self._part(("package",), tuple[Package, ...])

    @functools.cached_property
    def items(self) -> tuple[Item, ...]:
        """What is published and not checked. Raises MatrixError."""
        return self._part(("item",), tuple[Item, ...])

    def _part(self, path: tuple[str, ...], shape: type[T]) -> T:
        where = ".".join(path)
        value: Any = self._content
        for word in path:
            if not isinstance(value, dict) or word not in value:
                raise MatrixError(f"the support matrix says nothing of {where}")
            value = value[word]
        try:
            return msgspec.convert(value, shape)
        except msgspec.ValidationError as e:
            raise MatrixError(f"the support matrix is malformed at {where}: {e}") from None


class NoMatrix(Matrix):
    """In place of a matrix that cannot be read: whoever asks it hears why."""

    def __init__(self, why: str) -> None:
        super().__init__({})
        self._why = why

    def _part(self, path: tuple[str, ...], shape: type[T]) -> T:
        raise MatrixError(self._why)


def read_matrix(file: Path = FILE) -> Matrix:
    """The matrix in a file. Never raises: a file that is no matrix gives a `NoMatrix`."""
    try:
        return Matrix(tomllib.loads(file.read_text()))
    except OSError as e:
        return NoMatrix(f"the support matrix cannot be read: {e}")
    except ValueError as e:  # not TOML, or not UTF-8
        return NoMatrix(f"the support matrix {file} is malformed: {e}")


def numbers(version: str) -> tuple[int, ...]:
    """`2.10.1+cpu` as (2, 10, 1), without zeros at the end, so that 3 and 3.0 are the same."""
    found = [int(part) for part in re.findall(r"\d+", version.split("+")[0])]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)
