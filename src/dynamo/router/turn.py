"""How do the requests of one turn of the event loop share what routing costs?

What is done for one request after the other, with tokenizing and sending in between, finds the processor's caches full
of something else each time, and takes twice as long. So whoever has many requests leaves them here: the ends of this
turn are told to the router, then the questions asked, all in one go at the next, and each step of a question for all
before the next step.
"""

import asyncio
import logging
from collections.abc import Callable

from dynamo.router.ticket import Ticket

log = logging.getLogger(__name__)


class Turn:
    """What was left for the next turn. Needs a running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asks: list[Callable[[], None]] = []
        self._ends: list[tuple[Ticket, int | None, int | None]] = []
        self._comes = False
        self._next: list[Callable[[], None]] = []

    def ask(self, question: Callable[[], None]) -> None:
        """Call this soon. It must see to its own errors, and to whether anybody still wants to know."""
        self._asks.append(question)
        if not self._comes:
            self._comes = True
            self._loop.call_soon(self._run)

    def then(self, step: Callable[[], None]) -> None:
        """From within a question, or a step of it: call this once all others are as far."""
        self._next.append(step)

    def end(self, ticket: Ticket, output_tokens: int | None, cached_tokens: int | None) -> None:
        """`free` this ticket soon, before the next question is asked."""
        self._ends.append((ticket, output_tokens, cached_tokens))
        if not self._comes:
            self._comes = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._comes = False
        ends, self._ends = self._ends, []
        for ticket, output_tokens, cached_tokens in ends:
            ticket.free(output_tokens, cached_tokens)
        steps, self._asks = self._asks, []
        while steps:
            for step in steps:
                try:
                    step()
                except Exception:  # the others are waiting
                    log.exception("a request could not be routed")
            steps, self._next = self._next, []
