"""Does a stop string end the stream wherever the text is cut, and never show a part of itself?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.llm.stop_matcher import StopMatcher

LETTERS = st.sampled_from("abA👍\n ")
TEXT = st.text(LETTERS, max_size=30)
STOPS = st.lists(st.text(LETTERS, max_size=6), max_size=5)
CUTS = st.lists(st.integers(1, 6), max_size=40)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Read character by character; the first stop string to be complete ends it, the longest of several."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def chunks(text: str, cuts: list[int]) -> list[str]:
    found, at = [], 0
    for size in cuts:
        found.append(text[at : at + size])
        at += size
    return [*found, text[at:]]


@given(TEXT, STOPS, CUTS, st.booleans())
def test_output_is_the_text_before_the_first_stop_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    out, stopped_by = "", None
    for chunk in chunks(text, cuts):
        emitted, stop = matcher.push(chunk)
        out += emitted
        stopped_by = stopped_by or stop
    out += matcher.finish()
    assert (out, stopped_by) == reference(text, stops, include)
    assert matcher.stopped == (stopped_by is not None)


@given(TEXT, STOPS, CUTS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    seen = out = ""
    for chunk in chunks(text, cuts):
        seen += chunk
        emitted, stop = matcher.push(chunk)
        out += emitted
        if stop is not None:
            return
        prefixes = (stop[:length] for stop in stops for length in range(1, len(stop)))
        held = max((len(prefix) for prefix in prefixes if seen.endswith(prefix)), default=0)
        assert len(out) == len(seen) - held


def test_stop_string_over_three_pieces_never_shows() -> None:
    matcher = StopMatcher(["</tool>"])
    assert matcher.push("answer</") == ("answer", None)
    assert matcher.push("too") == ("", None)
    assert matcher.push("l> and more") == ("", "</tool>")
    assert matcher.push("even more") == ("", None)
    assert matcher.finish() == ""


def test_held_text_comes_out_when_it_turns_out_harmless() -> None:
    matcher = StopMatcher(["</tool>"])
    assert matcher.push("a </") == ("a ", None)
    assert matcher.push("b>") == ("</b>", None)


def test_held_text_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", None)
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""


def test_included_stop_string_goes_out_and_nothing_after_it() -> None:
    matcher = StopMatcher(["END"], include=True)
    assert matcher.push("the EN") == ("the ", None)
    assert matcher.push("D of it") == ("END", "END")


def test_stop_string_that_is_complete_first_wins_over_one_that_began_first() -> None:
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", "bc")


def test_of_two_that_are_complete_together_the_longer_wins() -> None:
    assert StopMatcher(["bc", "abc"]).push("xabc") == ("x", "abc")


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings_everything_goes_through(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert matcher.push("text") == ("text", None)
    assert matcher.finish() == ""


def test_long_stop_strings_are_no_trouble() -> None:
    stop = "ab" * 5000
    matcher = StopMatcher([stop])
    assert matcher.push("x" + stop[:-1]) == ("x", None)
    assert matcher.push(stop[-1]) == ("", stop)
