"""How are all facts learnt at once, in bounded time, whatever one of them does?"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dynamo.doctor.facts import Unknown

CHILD_SHARE = 0.9  # of a limit: what is asked gives up a little before it is given up, and can say why


@dataclass(frozen=True)
class Source:
    """Where one fact comes from. `ask` is told how many seconds it has, and is given up after `limit_s`."""

    ask: Callable[[float], object]
    limit_s: float


def gather(sources: Mapping[str, Source], timeout_s: float) -> dict[str, object]:
    """Ask all at once; by name what each gave, or an `Unknown` that says why it gave nothing.

    Returns within `timeout_s`. Who does not answer is left behind in a thread that ends with the process.
    """
    started = time.monotonic()
    facts: dict[str, object] = {}
    answers: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    limits = {name: min(source.limit_s, timeout_s) for name, source in sources.items()}
    for name, source in sources.items():
        words = (name, source, limits[name] * CHILD_SHARE, answers)
        threading.Thread(target=_ask, args=words, name=f"doctor {name}", daemon=True).start()
    for name, limit_s in sorted(limits.items(), key=lambda item: item[1]):
        while name not in facts:
            left_s = started + limit_s - time.monotonic()
            try:
                who, fact = answers.get(timeout=max(left_s, 0.001))
            except queue.Empty:
                who, fact = name, Unknown(f"no answer within {limit_s:g} s")
            facts.setdefault(who, fact)
    return {name: facts[name] for name in sources}


def _ask(name: str, source: Source, limit_s: float, answers: "queue.SimpleQueue[tuple[str, object]]") -> None:
    try:
        answers.put((name, source.ask(limit_s)))
    except Exception as e:  # noqa: BLE001 - whatever it was, one fact is not known, and here is why
        answers.put((name, Unknown(str(e) or type(e).__name__)))
