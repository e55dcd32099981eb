"""What came of a run, and did it hold what is promised?"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from chaos.load import OUTCOMES, Answer, Outcome

MUST_BE_NONE: tuple[Outcome, ...] = ("wrong", "lost", "hung")
GOAL = 0.999  # answered right, of the requests whose own frontend was not taken away
SHOWN = 12  # answers that were not right, in the text


@dataclass
class Window:
    """One fault, and when it was: from its beginning until the deployment was whole again, in seconds of the run."""

    fault: str
    target: str
    began: float
    mended: float
    whole: float
    rolling: bool = False
    worst_pause_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """A run."""

    seed: int
    backend: str
    seconds: float
    windows: list[Window]
    answers: list[Answer]
    began: float
    """By the clock of `answers`."""
    left_behind: list[str]
    """What was still there when all had left in order."""
    machine: str = ""

    def __post_init__(self) -> None:
        for window in self.windows:
            here = [a for a in self.answers if self.during(a, window)]
            window.outcomes = dict(Counter(a.outcome for a in here))
            window.worst_pause_s = round(max((a.worst_pause_s for a in here), default=0.0), 2)

    def during(self, answer: Answer, window: Window) -> bool:
        """Whether some of the request fell into the fault's window."""
        return answer.asked - self.began < window.whole and answer.ended - self.began > window.began

    @property
    def counts(self) -> Counter[str]:
        return Counter(answer.outcome for answer in self.answers)

    @property
    def worst_pause_s(self) -> float:
        return max((answer.worst_pause_s for answer in self.answers), default=0.0)

    def _most(self, seconds: Callable[[Answer], float]) -> list[Answer]:
        return sorted(self.answers, key=seconds, reverse=True)[:5]

    def _own_frontend_lost(self, answer: Answer) -> bool:
        """Whether the frontend that was answering was taken away in mid-answer: then nobody can go on."""
        return answer.outcome == "cut" and any(
            window.target == answer.frontend and not window.rolling and self.during(answer, window)
            for window in self.windows
        )

    @property
    def share_right(self) -> float:
        """Of the requests that could be answered."""
        could = [answer for answer in self.answers if not self._own_frontend_lost(answer)]
        return sum(answer.outcome == "right" for answer in could) / len(could) if could else 0.0

    @property
    def _made_good(self) -> int:
        return sum(answer.again == "right" for answer in self.answers)

    def broken(self) -> list[str]:
        """What was promised and not held."""
        counts = self.counts
        said = [f"{counts[outcome]} answers {outcome}" for outcome in MUST_BE_NONE if counts[outcome]]
        if not self.answers:
            said.append("nothing was asked")
        for window in self.windows:
            failed = {outcome: n for outcome, n in window.outcomes.items() if outcome != "right"}
            if window.rolling and failed:
                said.append(f"{window.fault}: {failed}")
        if self.answers and self.share_right < GOAL:
            said.append(f"{100 * self.share_right:.2f} % right, less than {100 * GOAL:g} %")
        return said + self.left_behind

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "backend": self.backend,
            "seconds": round(self.seconds, 1),
            "sent": len(self.answers),
            "outcomes": {outcome: self.counts[outcome] for outcome in OUTCOMES},
            "share_right": self.share_right,
            "share_right_of_all": self.counts["right"] / max(1, len(self.answers)),
            "worst_pause_s": self.worst_pause_s,
            "cut_and_right_when_asked_anew": self._made_good,
            "tried_again": sum(answer.tries > 1 for answer in self.answers),
            "faults": [asdict(window) for window in self.windows],
            "longest_pauses": [self._told(a) for a in self._most(lambda answer: answer.worst_pause_s)],
            "longest": [self._told(a) for a in self._most(lambda answer: answer.ended - answer.asked)],
            "not_right": [self._told(answer) for answer in self.answers if answer.outcome != "right"],
            "broken": self.broken(),
        }

    def _told(self, answer: Answer) -> dict[str, Any]:
        fields = asdict(answer)
        fields["asked"] = round(answer.asked - self.began, 2)
        fields["ended"] = round(answer.ended - self.began, 2)
        fields["faults"] = [window.fault for window in self.windows if self.during(answer, window)]
        fields["text"] = answer.text[-40:]
        return fields

    def as_text(self) -> str:
        counts, sent = self.counts, len(self.answers)
        lines = [
            f"{len(self.windows)} faults in {self.seconds:.0f} s, discovery by {self.backend}, seed {self.seed}",
            "",
        ]
        lines += [f"{'fault':47}{'hit':>19}{'from':>7}{'mended':>8}{'whole':>7}{'pause':>7}  not right"]
        for w in self.windows:
            bad = ", ".join(f"{n} {outcome}" for outcome, n in w.outcomes.items() if outcome != "right") or "-"
            lines.append(
                f"{w.fault:47}{w.target:>19}{w.began:7.1f}{w.mended:8.1f}{w.whole:7.1f}{w.worst_pause_s:7.1f}  {bad}"
            )
        lines += ["", f"{sent:6} requests sent, {sum(a.tries > 1 for a in self.answers)} of them more than once"]
        lines += [f"{counts[outcome]:6} {outcome:8}{what}" for outcome, what in OUTCOMES.items()]
        lines += [
            "",
            f"right: {100 * self.share_right:.3f} % of those whose own frontend stayed, "
            f"{100 * counts['right'] / max(1, sent):.3f} % of all (goal {100 * GOAL:g} %)",
            f"cut, and right when asked anew: {self._made_good} of {counts['cut']}",
            f"worst pause: {self.worst_pause_s:.1f} s",
        ]
        wrongs = [a for a in self.answers if a.outcome != "right"]
        for t in map(self._told, wrongs[:SHOWN]):
            when = f"request {t['number']} at {t['frontend']}, {t['asked']} to {t['ended']} s"
            lines.append(f"  {t['outcome']}: {when}, {', '.join(t['faults']) or 'no fault'}: {t['detail']}")
        if len(wrongs) > SHOWN:
            lines.append(f"  and {len(wrongs) - SHOWN} more, in the JSON")
        lines += ["", "BROKEN: " + "; ".join(self.broken()) if self.broken() else "All held."]
        return "\n".join(lines)
