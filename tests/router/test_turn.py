"""What is left for the next turn of the loop is done there, once, ends before questions."""

import asyncio

import pytest

from dynamo.router.turn import Turn


class Ended:
    """A ticket that notes when it is freed."""

    def __init__(self, done: list) -> None:
        self._done = done

    def free(self, output_tokens, cached_tokens) -> None:
        self._done.append((output_tokens, cached_tokens))


async def test_ends_are_told_before_the_questions_of_the_same_turn_are_asked():
    turn, done = Turn(), []
    turn.ask(lambda: done.append("first"))
    turn.end(Ended(done), 3, 1)
    turn.ask(lambda: done.append("second"))
    assert not done
    await asyncio.sleep(0)
    assert done == [(3, 1), "first", "second"]


async def test_what_a_question_leaves_is_done_in_the_turn_after():
    turn, done = Turn(), []
    turn.ask(lambda: turn.ask(lambda: done.append("again")))
    await asyncio.sleep(0)
    assert not done
    await asyncio.sleep(0)
    assert done == ["again"]


async def test_each_step_is_taken_for_all_before_the_next():
    turn, done = Turn(), []

    def question(name: str):
        def ask() -> None:
            done.append(f"{name} asks")
            turn.then(lambda: done.append(f"{name} goes"))

        return ask

    turn.ask(question("one"))
    turn.ask(question("two"))
    await asyncio.sleep(0)
    assert done == ["one asks", "two asks", "one goes", "two goes"]


async def test_a_question_that_fails_keeps_the_others_from_nothing(caplog: pytest.LogCaptureFixture):
    turn, done = Turn(), []
    turn.ask(lambda: done.append(1 / 0))
    turn.ask(lambda: done.append("asked"))
    await asyncio.sleep(0)
    assert done == ["asked"]
    assert "could not be routed" in caplog.text
