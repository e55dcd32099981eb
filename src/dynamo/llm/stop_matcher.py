"""Where in a stream of text does a stop string end it, and what text may go out before that is known?"""

from collections.abc import Iterable


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, and never lets a part of it out.

    "First" is the one that is complete first, as if the text came character by character; of several that are
    complete at the same character the longest wins, because it leaves the least behind. So the answer does not
    depend on how the text was cut, and nothing waits once some stop string is complete. Held back is only the
    longest end of the text that is a proper prefix of some stop string. Empty stop strings are ignored.
    """

    __slots__ = ("_firsts", "_held", "_include", "_prefixes", "_stopped", "_stops")

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        self._stops = sorted({stop for stop in stops if stop})
        self._include = include
        self._held = ""
        self._stopped = False
        self._firsts = frozenset(stop[0] for stop in self._stops)
        # Proper prefixes by their last character, longest first, as (stop, length): the candidates for holding back.
        self._prefixes: dict[str, list[tuple[str, int]]] = {}
        lengths = [(length, stop) for stop in self._stops for length in range(1, len(stop))]
        for length, stop in sorted(lengths, reverse=True):
            self._prefixes.setdefault(stop[length - 1], []).append((stop, length))

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the stream."""
        return self._stopped

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may go out now, and the stop string that ended the stream if one did.

        With `include` the stop string itself goes out too. After a stop nothing more comes out.
        """
        if self._stopped:
            return "", None
        if not self._held and self._firsts.isdisjoint(text):
            return text, None
        text = self._held + text
        found = self._first_complete(text)
        if found is not None:
            self._stopped = True
            self._held = ""
            start, stop = found
            return text[: start + len(stop) if self._include else start], stop
        cut = len(text) - self._unsure(text)
        self._held = text[cut:]
        return text[:cut], None

    def _first_complete(self, text: str) -> tuple[int, str] | None:
        """(start, stop) of the occurrence with the smallest end, and of those the smallest start."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return best and best[1:]

    def _unsure(self, text: str) -> int:
        """How many characters at the end could still grow into a stop string."""
        for stop, length in self._prefixes.get(text[-1:], ()):
            if length <= len(text) and text.endswith(stop[:length]):
                return length
        return 0

    def finish(self) -> str:
        """The text still held, once it is known that no more comes."""
        held, self._held = self._held, ""
        return held
