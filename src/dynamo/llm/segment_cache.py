"""Which tokens has text that was seen before, so that only what is new is encoded?

Two levels. *Parts* of about a thousand characters, cut from the start of a text on, so that texts with a common
beginning have the same parts up to where they differ: a long shared prompt costs a few dozen look-ups. *Words*, for
the rest: most words of a new text have been seen somewhere. Only unknown words are encoded, all in one call.

Both are cut where the tokenizer provably never joins (`dynamo.llm.text_cuts`), so the tokens are exactly those of
the plain path.
"""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain
from threading import Lock
from unicodedata import is_normalized

from dynamo.llm.text_cuts import Cuts

DEFAULT_BYTES = 64 * 2**20  # about 800 prompts of 6000 tokens; DYN_TOKENIZER_CACHE_BYTES
PART_CHARS = 1024  # a part costs about 1.5 us to find, and a text that leaves the shared path loses half of one
_WORD_SHARE = 0.25  # of the bytes; a vocabulary of words is small beside the texts made of them
_ENTRY_BYTES = 150  # dict slot (about 95, at its emptiest) and tuple head (56)
_INT_BYTES = 36  # an int of its own and the pointer to it
_POINTER_BYTES = 8
_CHARS_PER_CALL = 12  # encoding one word alone takes 3 us, as long as this many characters within a longer text
_MOSTLY = 0.8  # of a part's words unknown: random letters have all, new prose has a third
_LEARN_ONE_IN = 8
_OTHER_WHITE = "\t\r\x0b\x0c\x1c\x1d\x1e\x1f"  # of ASCII, beside the space and the newline

Ids = tuple[int, ...]
EncodePieces = Callable[[list[str]], list[list[int]]]
TokenBytes = Callable[[int], bytes]


class _Lengths(dict[int, int]):
    """Token id → how many bytes it stands for, asked for once each."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        super().__init__()
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> int:
        length = len(self._token_bytes(token_id))
        self[token_id] = length
        return length


class Generations:
    """A bounded map text → ids. What was not asked for during a whole generation is forgotten.

    New and asked-for entries are in the young generation; when that has half of the bytes it becomes the old one,
    and the old one goes. Reads need no lock; writers hold their owner's.
    """

    __slots__ = ("_old_bytes", "_young_bytes", "limit_bytes", "old", "young")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.young: dict[str, Ids] = {}
        self.old: dict[str, Ids] = {}
        self._young_bytes = 0
        self._old_bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._young_bytes + self._old_bytes

    def get(self, text: str) -> Ids | None:
        """The ids, without renewing the entry."""
        found = self.young.get(text)
        return found if found is not None else self.old.get(text)

    def put(self, text: str, ids: Ids, id_bytes: int) -> None:
        """Add or renew an entry whose ids cost `id_bytes` each. One that is larger than half the limit is not kept."""
        self.put_all({text: ids}, id_bytes)

    def put_all(self, entries: dict[str, Ids], id_bytes: int) -> None:
        """Add or renew entries."""
        half, young = self.limit_bytes // 2, self.young
        for text, ids in entries.items():
            size = sys.getsizeof(text) + _ENTRY_BYTES + id_bytes * len(ids)
            if size > half or text in young:
                continue
            if self._young_bytes + size > half:
                self.old, self.young = young, {}
                young = self.young
                self._old_bytes, self._young_bytes = self._young_bytes, 0
            young[text] = ids
            self._young_bytes += size


@dataclass
class CacheCounts:
    """How much was found. `hits` and `misses` count texts, by whether a prefix of whole parts was known."""

    hits: int = 0
    misses: int = 0
    cached_tokens: int = 0
    uncached_tokens: int = 0


class TokenIds(list[int]):
    """The ids of a text, and the parts that they begin with: of texts that begin alike these are the same objects, so
    that who has seen one need not look at its tokens again."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Ids] = []


@dataclass
class Beginning:
    """A text of which the first `at` characters are looked up, and their ids."""

    text: str
    at: int = 0
    ids: TokenIds = field(default_factory=TokenIds)

    @property
    def open_chars(self) -> int:
        return len(self.text) - self.at


class SegmentCache:
    """Tokens of parts and words of text, for one tokenizer. Bounded by bytes; safe to share among threads."""

    def __init__(
        self,
        cuts: Cuts,
        encode_pieces: EncodePieces,
        token_bytes: TokenBytes | None = None,
        limit_bytes: int = DEFAULT_BYTES,
        part_chars: int = PART_CHARS,
    ) -> None:
        """`token_bytes` tells how many bytes of text a token stands for, if that does not depend on its place."""
        self._cuts = cuts
        self._encode_pieces = encode_pieces
        self._token_bytes = None if token_bytes is None else _Lengths(token_bytes)
        self._part_chars = part_chars
        words = int(limit_bytes * _WORD_SHARE)
        self._parts = Generations(limit_bytes - words)
        self._spaced = Generations(words * 3 // 4)  # words without the one space that stands before them
        self._others = Generations(words // 4)  # words as they are
        self._lock = Lock()
        self._left_alone = 0
        self.counts = CacheCounts()

    @property
    def held_bytes(self) -> int:
        """An estimate of the memory that the entries take."""
        return self._parts.held_bytes + self._spaced.held_bytes + self._others.held_bytes

    def encode(self, text: str) -> list[int]:
        """Ids of the text, as the tokenizer gives them without opening and closing tokens."""
        return self.finish(self.begin(text))

    def begin(self, text: str) -> Beginning:
        """Look up as many parts from the start as are known. Fast, whatever the length of the text."""
        begun = Beginning(text)
        ids, young, search = begun.ids, self._parts.young, self._cuts.anywhere.search
        at, last = 0, len(text) - self._part_chars
        while at < last:
            found = search(text, at + self._part_chars)
            end = found.end() if found else len(text)
            part = text[at:end]
            known = young.get(part)
            if known is None:
                known = self._parts.old.get(part)
                if known is None:
                    break
                self._renew(part, known)
                young = self._parts.young
            ids += known
            ids.parts.append(known)
            at = end
        begun.at = at
        return begun

    def _renew(self, part: str, ids: Ids) -> None:
        with self._lock:
            self._parts.put(part, ids, _POINTER_BYTES)

    def finish(self, begun: Beginning) -> list[int]:
        """Encode the rest, and remember it."""
        ids = begun.ids
        known = len(ids)
        for part in self._rest(begun):
            found = self._words_of(part)
            ids += found
            if len(part) >= self._part_chars:
                kept = tuple(found)
                ids.parts.append(kept)
                with self._lock:
                    self._parts.put(part, kept, _POINTER_BYTES)
        self._count(begun, known)
        return ids

    def _rest(self, begun: Beginning) -> Iterable[str]:
        text, at = begun.text, begun.at
        while at < len(text):
            end = len(text)
            if end - at > self._part_chars:
                found = self._cuts.anywhere.search(text, at + self._part_chars)
                end = found.end() if found else end
            yield text[at:end]
            at = end

    def _count(self, begun: Beginning, known: int) -> None:
        counts = self.counts
        counts.cached_tokens += known
        counts.uncached_tokens += len(begun.ids) - known
        if known:
            counts.hits += 1
        elif len(begun.text) > self._part_chars:
            counts.misses += 1

    def _words_of(self, part: str) -> list[int]:
        if self._cuts.words is None:
            return self._look_up([part], part, self._others, "")
        if not self._has_plain_spaces(part):
            return self._look_up(re.split(self._cuts.words, part), part, self._others, "")
        first, *words = part.split(" ") if "\n " not in part else _words_of_lines(part)
        ids = self._look_up([first], first, self._others, "") if first else []
        return ids + self._look_up(words, part[len(first) :], self._spaced, " ")

    def _has_plain_spaces(self, part: str) -> bool:
        """Whether each space in the part may be cut before: none follows white space, or only single newlines."""
        if not self._cuts.plain_spaces or not part.isascii() or "  " in part:
            return False
        if part.replace("\n", "").isprintable():  # the usual case, for a tenth of what the searches cost
            return True
        return not any(white in part and f"{white} " in part for white in _OTHER_WHITE)

    def _look_up(self, words: list[str], text: str, level: Generations, before: str) -> list[int]:
        """Ids of `text`, which is its words with `before` in front of each."""
        found = list(map(level.young.get, words))
        try:
            return list(chain.from_iterable(found))  # type: ignore[arg-type]  # None raises, which is cheaper than a look
        except TypeError:
            missing = {word for word, ids in zip(words, found, strict=True) if ids is None}
        if self._is_hopeless(len(missing), len(words), level):
            return self._encode_pieces([text])[0]
        if len(missing) > 1 and len(missing) * _CHARS_PER_CALL > len(text):
            apart = self._encode_and_part(text, words, len(before))
            if apart is not None:
                learned = dict(zip(words, apart, strict=True))
                with self._lock:
                    level.put_all({word: learned[word] for word in missing}, _INT_BYTES)
                return list(chain.from_iterable(apart))
        learned = self._learn(missing, level, before)
        return list(
            chain.from_iterable(learned[word] if ids is None else ids for word, ids in zip(words, found, strict=True))
        )

    def _is_hopeless(self, missing: int, words: int, level: Generations) -> bool:
        """Whether words so unlike the many that are known are better left alone: they would only push those out.

        One part in eight is learnt all the same, or a new language would never come in.
        """
        if missing < _MOSTLY * words or words == 1 or not level.old:
            return False
        self._left_alone += 1
        return self._left_alone % _LEARN_ONE_IN != 0

    def _learn(self, words: set[str], level: Generations, before: str) -> dict[str, Ids]:
        """Ids of words that are not in the young generation."""
        old = level.old
        learned = {word: ids for word in words if (ids := old.get(word)) is not None}
        unknown = {word: self._pieces_of(before + word) for word in words if word not in learned}
        ids_of = self._encode_apart({piece for pieces in unknown.values() for piece in pieces})
        for word, pieces in unknown.items():
            learned[word] = tuple(chain.from_iterable(map(ids_of.__getitem__, pieces)))
        with self._lock:
            level.put_all(learned, _INT_BYTES)
        return learned

    def _pieces_of(self, word: str) -> list[str]:
        """A word without the special tokens that hang on it, as on the first and the last of a chat's message."""
        specials = self._cuts.specials
        if specials is None or specials.search(word) is None:
            return [word]
        return [piece for piece in specials.split(word) if piece]

    def _encode_apart(self, pieces: set[str]) -> dict[str, Ids]:
        """Ids of pieces as they stand; those that are new are encoded in one call."""
        found: dict[str, Ids] = {}
        for piece in pieces:
            ids = self._spaced.get(piece[1:]) if piece.startswith(" ") else self._others.get(piece)
            if ids is not None:
                found[piece] = ids
        new = [piece for piece in pieces if piece not in found]
        if new:
            found.update(zip(new, map(tuple, self._encode_pieces(new)), strict=True))
            with self._lock:
                self._others.put_all({piece: found[piece] for piece in new if not piece.startswith(" ")}, _INT_BYTES)
        return found

    def _encode_and_part(self, text: str, words: list[str], before_chars: int) -> list[Ids] | None:
        """Encode the text at once and give each word its ids; None if that cannot be told.

        It is told by how many bytes each token stands for, which works if every byte of the text is in some token:
        not for a text that is normalized first, nor where a special token swallows the space beside it.
        """
        lengths = self._token_bytes
        if lengths is None:
            return None
        if text.isascii():
            sizes = [len(word) + before_chars for word in words]
        elif is_normalized("NFC", text):
            sizes = [len(word.encode()) + before_chars for word in words]
        else:
            return None
        (ids,) = self._encode_pieces([text])
        token_at = dict(zip(accumulate(map(lengths.__getitem__, ids)), range(1, len(ids) + 1), strict=True))
        lasts = [token_at.get(end, -1) for end in accumulate(sizes)]
        if -1 in lasts or lasts[-1] != len(ids):
            return None
        return [tuple(ids[first:last]) for first, last in zip(chain((0,), lasts), lasts, strict=False)]


def _words_of_lines(part: str) -> list[str]:
    """The words that single spaces part, where a space after a newline parts none."""
    words = [""]
    for line in part.split("\n "):
        first, *others = line.split(" ")
        words[-1] += f"\n {first}"
        words += others
    words[0] = words[0][2:]
    return words
