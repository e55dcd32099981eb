"""What does a check say?"""

from typing import Literal

import msgspec

from dynamo.doctor.matrix import Row, Rule

Verdict = Literal["supported", "experimental", "unsupported", "unknown"]


class Check(msgspec.Struct, frozen=True):
    """One line of the doctor's table. `fix` is what to do, mostly a command; empty where nothing is to be done."""

    id: str
    title: str
    group: str
    value: str
    verdict: Verdict
    why: str
    fix: str = ""
    optional: bool = False


class Finding(msgspec.Struct, frozen=True):
    """What a judge made of a fact: the row that is for it, the value in words, what is to be added to the row."""

    row: Row
    value: str
    note: str = ""
    fix: str = ""


def named(rule: Rule, name: str, value: str, note: str = "", fix: str = "") -> Finding:
    """A finding by a row's name. Raises MatrixError if the matrix lacks it."""
    return Finding(rule.named(name), value, note, fix)


def level(rule: Rule, number: str, value: str, note: str = "") -> Finding:
    """A finding by the row that a number reaches. Raises MatrixError if the matrix has none."""
    return Finding(rule.level(number), value, note)


def and_more(words: tuple[str, ...], shown: int = 2) -> str:
    """The first few of several things."""
    rest = len(words) - shown
    return "; ".join(words[:shown]) + (f"; and {rest} more" if rest > 0 else "")
