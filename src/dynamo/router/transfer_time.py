"""How long does it take a decode worker to go on from a prompt that another worker has computed?

Decode workers tell with their first output how many tokens' KV came over and how long that took, from when they got the
request until their engine went on: asking for the KV, the way itself, and the step after it. That is a line over the
tokens, learnt as the times of prompts are: one of all ways together, and one for each distance, which is how many
places (zone, rack) the two workers have in common.
"""

from collections.abc import Mapping
from typing import Any

from dynamo.router.policies.line import Line

PRIOR = ((0.0, 0.01), (8192.0, 0.03))  # (tokens, seconds): 128 KiB a token at 50 GB/s, after a question and a step
MAX_TOKEN_S = 0.01  # 128 KiB at 13 MB/s: on a slower way nothing is worth sending
REPORT = "kv_transfer"  # in `EngineOutput.engine_data`
LESSONS = 10  # transfers; a distance with fewer is taken for an ordinary one
MAX_PLACES = 16  # distances apart; kinds of places are a handful


class TransferTime:
    """Of one model's prefill and decode workers."""

    def __init__(self) -> None:
        self._line = Line(PRIOR, MAX_TOKEN_S)
        self._lines: dict[int, Line] = {}
        self.seen = 0
        """Transfers it has learnt from."""

    def seconds(self, tokens: int, places: int | None = None) -> float:
        """For the KV of so many tokens, between workers with so many places in common."""
        line = self._lines.get(places) if places is not None else None
        return (line if line is not None and line.seen >= LESSONS else self._line).at(tokens)

    def see(self, engine_data: Mapping[str, Any], places: int = 0) -> None:
        """Learn from what a decode worker said with an output. What is no report of a transfer is not seen."""
        report = engine_data.get(REPORT)
        if not isinstance(report, Mapping):
            return
        tokens, seconds = report.get("tokens"), report.get("seconds")
        if isinstance(tokens, int) and isinstance(seconds, int | float) and self._line.see(tokens, seconds):
            self.seen += 1
            line = self._lines.setdefault(min(places, MAX_PLACES), Line(PRIOR, MAX_TOKEN_S))
            line.see(tokens, seconds)

    def facts(self) -> dict[str, Any]:
        """For people: transfers seen, seconds whatever the length, and for each token; the same by distance."""
        return {
            "seen": self.seen,
            "seconds": self._line.height,
            "token_seconds": self._line.slope,
            "by_places_in_common": {
                str(places): {"seconds": line.height, "token_seconds": line.slope}
                for places, line in sorted(self._lines.items())
                if line.seen >= LESSONS
            },
        }
