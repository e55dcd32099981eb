"""Which places in a text does a pre-tokenizer's regular expression never join, whatever the text?

A tokenizer first splits text into words by the matches of a pattern, then each word into tokens. If no match can
reach over a place, and some match begins or ends there, the text may be cut at it. This module reads a pattern and
answers for two kinds of place; it knows a small part of the regular-expression language and says no to all else.

- *before a space* that follows a solid (not white-space) character;
- *after a newline* that a letter follows.

The argument, for a place between characters a and b: (1) no alternative can consume a and later b; (2) what an
alternative looks at without consuming it is the same whether b or the end of the text follows; (3) some alternative
surely matches at the place. Then matching from the left arrives at the place in the whole text exactly as in the left
part alone, and goes on from there as at the start of the right part. Looking behind is not allowed at all.
"""

import re
from dataclasses import dataclass, replace

_MANY = 1 << 30


@dataclass(frozen=True)
class CharSet:
    """What a character class may match (an upper bound), and whether it surely matches a space or a line feed."""

    space: bool = False
    newline: bool = False
    letter: bool = False
    other_solid: bool = False
    surely_space: bool = False
    surely_line_feed: bool = False

    @property
    def solid(self) -> bool:
        return self.letter or self.other_solid

    def __or__(self, other: "CharSet") -> "CharSet":
        return CharSet(
            self.space or other.space,
            self.newline or other.newline,
            self.letter or other.letter,
            self.other_solid or other.other_solid,
            self.surely_space or other.surely_space,
            self.surely_line_feed or other.surely_line_feed,
        )

    def unsure(self) -> "CharSet":
        """The upper bound alone."""
        return replace(self, surely_space=False, surely_line_feed=False)


@dataclass(frozen=True)
class Item:
    """A class with the number of characters it takes; or, with `asserts`, a look at what follows."""

    chars: CharSet
    at_least: int = 1
    at_most: int = 1
    asserts: str = ""
    """`not`: the next character is not of the class; `end`: the text (or line) ends here."""


class UnknownSyntaxError(ValueError):
    """The pattern uses something that is not known here."""


_SPACE = CharSet(space=True, surely_space=True)
_LINE_FEED = CharSet(newline=True, surely_line_feed=True)
_WHITE = CharSet(space=True, newline=True, surely_space=True, surely_line_feed=True)
_SOLID = CharSet(letter=True, other_solid=True)
_ANY = _WHITE | _SOLID
_OTHER = CharSet(other_solid=True)
_LETTER = CharSet(letter=True)
_SCRIPTS = {"Han", "Hiragana", "Katakana", "Hangul", "Latin", "Cyrillic", "Arabic", "Thai", "Greek", "Hebrew"}
_ESCAPES = {
    "s": _WHITE,
    "S": _SOLID,
    "d": _OTHER,
    "D": _ANY,
    "w": _SOLID,
    "W": _WHITE | _OTHER,
    "r": CharSet(newline=True),
    "n": _LINE_FEED,
    "t": CharSet(),
    "v": CharSet(),
    "f": CharSet(),
}
_SEPARATORS = "\x1c\x1d\x1e\x1f"  # white space for Python, not for the engines that run these patterns


def _property(name: str) -> CharSet:
    if name.startswith("L"):
        return _LETTER
    if name in _SCRIPTS:
        return _SOLID  # letters, and marks and digits of the script
    if name[:1] in ("N", "M", "P", "S") and len(name) <= 2:
        return _OTHER
    raise UnknownSyntaxError(rf"\p{{{name}}}")


class _Reader:
    """Reads one pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0

    def _peek(self, word: str) -> bool:
        return self._text.startswith(word, self._at)

    def _take(self, word: str) -> bool:
        if self._peek(word):
            self._at += len(word)
            return True
        return False

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise UnknownSyntaxError("the pattern ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def alternatives(self) -> list[list[Item]]:
        """Everything up to the end or an unmatched `)`."""
        found: list[list[Item]] = [[]]
        while self._at < len(self._text) and not self._peek(")"):
            if self._take("|"):
                found.append([])
            else:
                found[-1].append(self._item())
        return found

    def whole(self) -> list[list[Item]]:
        found = self.alternatives()
        if self._at < len(self._text):
            raise UnknownSyntaxError("unmatched )")
        return found

    def _item(self) -> Item:
        if self._take("(?!"):
            return Item(self._looked_at(), 0, 0, "not")
        if self._take("$"):
            return Item(CharSet(), 0, 0, "end")
        if self._peek("("):
            return self._quantified(self._group())
        return self._quantified(self._one())

    def _looked_at(self) -> CharSet:
        """The one class inside a negative look-ahead."""
        inside = self.alternatives()
        if not self._take(")") or len(inside) != 1 or len(inside[0]) != 1:
            raise UnknownSyntaxError("look-ahead at more than one character")
        item = inside[0][0]
        if item.asserts or (item.at_least, item.at_most) != (1, 1):
            raise UnknownSyntaxError("look-ahead at more than one character")
        return item.chars

    def _group(self) -> Item:
        """A group, taken as any number of any characters that occur in it; at least one if it cannot be empty."""
        if not (self._take("(?i:") or self._take("(?:")):
            self._next()
            if self._peek("?"):
                raise UnknownSyntaxError("a group of unknown kind")
        chars = CharSet()
        inside = self.alternatives()
        if not self._take(")"):
            raise UnknownSyntaxError("a group without end")
        for item in (item for alternative in inside for item in alternative):
            if item.asserts:
                raise UnknownSyntaxError("a look-ahead inside a group")
            chars |= item.chars
        return Item(chars.unsure(), int(all(map(_takes_something, inside))), _MANY)

    def _one(self) -> CharSet:
        char = self._next()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape(self._next())
        if char == ".":
            return _ANY
        if char in "^*+?{":
            raise UnknownSyntaxError(char)
        return self._literal(char)

    @staticmethod
    def _literal(char: str) -> CharSet:
        if char == " ":
            return _SPACE
        if char == "\n":
            return _LINE_FEED
        if char == "\r":
            return CharSet(newline=True)
        if char.isspace() and char not in _SEPARATORS:
            return CharSet()
        return _LETTER if char.isalpha() else _OTHER

    def _escape(self, char: str) -> CharSet:
        if char in "pP":
            if not self._take("{"):
                raise UnknownSyntaxError(rf"\{char}")
            end = self._text.index("}", self._at) if "}" in self._text[self._at :] else -1
            name = self._text[self._at : end]
            if char == "P" or end < 0 or name.startswith("^"):
                raise UnknownSyntaxError(rf"\{char}{{{name}}}")
            self._at = end + 1
            return _property(name)
        if char in _ESCAPES:
            return _ESCAPES[char]
        if char.isalnum():
            raise UnknownSyntaxError(rf"\{char}")
        return self._literal(char)

    def _class(self) -> CharSet:
        negated = self._take("^")
        members: list[CharSet] = []
        texts: set[str] = set()
        while not (self._peek("]") and members):
            if self._take("&&"):
                if negated:
                    raise UnknownSyntaxError("an intersection in a negated class")
                # An intersection only takes characters away, so the left side is an upper bound.
                self._skip_operand()
                return _union(members).unsure()
            if self._peek("["):
                raise UnknownSyntaxError("a class inside a class")
            start = self._at
            members.append(self._member())
            texts.add(self._text[start : self._at])
        self._next()
        return _complement(_union(members), texts) if negated else _union(members)

    def _skip_operand(self) -> None:
        """Pass over the right side of `&&`, one bracketed class, and the bracket that closes the outer one."""
        if not self._take("["):
            raise UnknownSyntaxError("&& with something other than a class")
        self._class()
        if not self._take("]"):
            raise UnknownSyntaxError("&& in the middle of a class")

    def _member(self) -> CharSet:
        """One member of a class: an escape, a character or a range."""
        char = self._next()
        if char == "\\":
            char = self._next()
            if char in "pP" or (char in _ESCAPES and not self._peek("-")):
                return self._escape(char)
            if char.isalnum():
                raise UnknownSyntaxError(rf"\{char} in a class")
        if self._peek("-") and not self._peek("-]"):
            self._next()
            end = self._next()
            if end == "\\":
                end = self._next()
                if end.isalnum():
                    raise UnknownSyntaxError("a range up to an escape")
            return _range(char, end)
        return self._literal(char)

    def _quantified(self, found: CharSet | Item) -> Item:
        item = found if isinstance(found, Item) else Item(found)
        least, most = 1, 1
        if self._take("?"):
            least, most = 0, 1
        elif self._take("*"):
            least, most = 0, _MANY
        elif self._take("+"):
            least, most = 1, _MANY
        elif self._take("{"):
            end = self._text.find("}", self._at)
            counts = re.fullmatch(r"(\d+)(,(\d*))?", self._text[self._at : max(end, self._at)])
            if counts is None:
                raise UnknownSyntaxError("a quantifier")
            self._at = end + 1
            least = int(counts[1])
            most = least if counts[2] is None else int(counts[3] or _MANY)
        else:
            return item
        if self._take("?") or self._take("+"):  # lazy or possessive: matches no more than the greedy form could
            pass
        return Item(item.chars, min(least, item.at_least * least), most if item.at_most == 1 else _MANY)


def _union(members: list[CharSet]) -> CharSet:
    chars = CharSet()
    for one in members:
        chars |= one
    return chars


def _complement(inside: CharSet, texts: set[str]) -> CharSet:
    """What a negated class may match, given its members' union and their texts."""
    every_letter = not texts.isdisjoint((r"\p{L}", r"\w", r"\S"))
    return CharSet(
        space=not inside.surely_space,
        newline=not inside.surely_line_feed,
        letter=not every_letter,
        other_solid=r"\S" not in texts,
    )


def _range(first: str, last: str) -> CharSet:
    if last < first:
        raise UnknownSyntaxError("a range that is empty")
    return CharSet(
        space=first <= " " <= last,
        newline=first <= "\r" and last >= "\n",
        letter=True,
        other_solid=True,
        surely_space=first <= " " <= last,
        surely_line_feed=first <= "\n" <= last,
    )


@dataclass(frozen=True)
class Places:
    """At which kinds of place a pattern's matches may be cut: nothing reaches over it, and a match meets it there."""

    before_space: bool
    before_space_met: bool
    after_newline: bool
    after_newline_met: bool


NOWHERE = Places(before_space=False, before_space_met=False, after_newline=False, after_newline_met=False)


def places(pattern: str) -> Places:
    """What is known about a pattern; all False if it cannot be read."""
    try:
        alternatives = _Reader(pattern).whole()
    except UnknownSyntaxError:
        return NOWHERE
    if not all(map(_takes_something, alternatives)):
        return NOWHERE  # it may match nothing at all, and where such matches lie is the engine's affair
    eaters = [_eats_newlines(items) for items in alternatives]
    asserting = [any(item.asserts for item in items) for items in alternatives]
    first_eater = eaters.index(True) if True in eaters else len(eaters)
    return Places(
        before_space=all(_never_takes_space_later(items) for items in alternatives),
        before_space_met=any(_surely_takes_space(items) for items in alternatives),
        # White space that ends in a newline is taken whole by the first eater, so later looks never see its end.
        after_newline=not any(asserting[:first_eater])
        and all(_never_takes_letter_after_newline(items) for items in alternatives),
        after_newline_met=True in eaters,
    )


def _takes_something(items: list[Item]) -> bool:
    return any(item.at_least for item in items)


def _follows(items: list[Item], first: str, then: str) -> bool:
    """Whether a match could take a character of kind `first` and, anywhere after it, one of kind `then`."""
    for i, item in enumerate(items):
        if not getattr(item.chars, first) or item.asserts:
            continue
        later = items[i:] if item.at_most > 1 else items[i + 1 :]
        if any(getattr(other.chars, then) for other in later if not other.asserts):
            return True
    return False


def _only_white_before(items: list[Item], index: int) -> bool:
    """Whether a match that got to `items[index]` has just taken white space, surely."""
    before = [item for item in items[:index] if not item.asserts]
    return any(item.at_least for item in before) and not any(item.chars.solid for item in before)


def _never_takes_space_later(items: list[Item]) -> bool:
    for i, item in enumerate(items):
        # At the place a solid character was taken last; there, a look must not tell a space from the end.
        same_answer = item.asserts == "not" and not item.chars.space
        if item.asserts and not (same_answer or _only_white_before(items, i)):
            return False
    return not _follows(items, "solid", "space")


def _never_takes_letter_after_newline(items: list[Item]) -> bool:
    for i, item in enumerate(items):
        # `\\s+(?!\\S)` is dealt with by the order of alternatives; any other look must not tell a letter from the end.
        same_answer = item.asserts == "not" and not item.chars.letter
        if item.asserts and not (same_answer or _only_white_before(items, i)):
            return False
    return not _follows(items, "newline", "letter")


def _surely_takes_space(items: list[Item]) -> bool:
    return len(items) == 1 and items[0].chars.surely_space and items[0].at_least <= 1 and not items[0].asserts


def _eats_newlines(items: list[Item]) -> bool:
    """Whether this is `\\s*[\\r\\n]+` or `\\s*[\\r\\n]`: takes white space up to its last newline."""
    if len(items) != 2 or any(item.asserts for item in items):
        return False
    white, newlines = items
    return (
        white.chars == _WHITE
        and (white.at_least, white.at_most) == (0, _MANY)
        and newlines.chars == _LINE_FEED
        and newlines.at_least == 1
    )
