"""What does a ChoiceDecoder make of an engine's outputs?"""

import codecs
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.llm.logprobs import ChatLogprobs, CompletionLogprobs, LogprobFormat
from dynamo.llm.output import ChoiceDecoder, Echo, OutputPlan, TextDelta
from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, FinishReason, PromptTokensDetails, TopLogprob
from dynamo.llm.protocols.tools import ForcedTools
from dynamo.runtime.errors import InvalidArgument, Unknown

EOS = 300  # byte tokens below 256; above, tokens without text


class Bytes:
    """A vocabulary of bytes: token 65 is `A`; a decoder of its streams is one of UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def push(self, ids: list[int]) -> str:
        return self._utf8.decode(b"".join(map(self.token_bytes, ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def decoder(**plan: Any) -> ChoiceDecoder:
    return ChoiceDecoder(OutputPlan(new_decoder=Bytes, **{"eos_ids": frozenset({EOS}), **plan}))


def out(text: str | list[int] = "", finish: FinishReason | None = None, **fields: Any) -> EngineOutput:
    ids = list(text.encode()) if isinstance(text, str) else text
    return EngineOutput(token_ids=ids, finish_reason=finish, **fields)


def read(choice: ChoiceDecoder, *outputs: EngineOutput) -> tuple[str, TextDelta]:
    """All text, and the last delta."""
    deltas = [choice.push(output) for output in outputs]
    return "".join(delta.text for delta in deltas), deltas[-1]


@pytest.mark.parametrize(
    ("finish", "word"), [("stop", "stop"), ("eos", "stop"), ("length", "length"), ("content_filter", "content_filter")]
)
def test_finish_reasons_are_openai_words(finish: FinishReason, word: str) -> None:
    text, last = read(decoder(), out("hi"), out("!", finish))
    assert (text, last.finish_reason) == ("hi!", word)


def test_a_cancelled_choice_says_so() -> None:
    assert decoder().push(out("", "cancelled")).finish_reason == "cancelled"


def test_an_engine_error_ends_the_choice_with_an_error() -> None:
    choice = decoder()
    assert choice.push(out("x", "error")).finish_reason == "error"
    assert isinstance(choice.error, Unknown)


def test_the_end_of_sequence_token_is_hidden_but_counted() -> None:
    choice = decoder()
    text, last = read(choice, out("ab"), out([EOS], "eos"))
    assert text == "ab"
    assert last.token_count == 1
    assert choice.completion_tokens == 3
    assert not choice.stopped_early


def test_an_engine_that_runs_past_the_end_is_stopped() -> None:
    choice = decoder()
    text, last = read(choice, out([65, EOS, 66]))
    assert (text, last.finish_reason) == ("A", "stop")
    assert choice.stopped_early
    assert choice.completion_tokens == 2
    assert choice.push(out("more")) == TextDelta("")


def test_ignore_eos_goes_on() -> None:
    text, last = read(decoder(eos_ids=frozenset()), out([65, EOS, 66]))
    assert (text, last.finish_reason) == ("AB", None)


def test_an_end_before_min_tokens_does_not_count() -> None:
    text, last = read(decoder(min_tokens=3), out([65]), out([EOS]), out([66]), out([EOS]))
    assert (text, last.finish_reason) == ("AB", "stop")


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_is_hidden_unless_asked_for(include: bool, text: str) -> None:
    choice = decoder(stop_ids=frozenset({ord("c")}), include_stop=include)
    assert read(choice, out("a"), out("b"), out("c"))[0] == text
    assert choice.finish_reason == "stop"


def test_the_stop_reason_names_the_stop_token() -> None:
    choice = decoder(stop_ids=frozenset({99}))
    assert choice.push(out("c", "stop", stop_reason=99)).stop_reason == 99
    assert decoder().push(out([EOS], "stop")).stop_reason is None


def test_a_stop_token_only_the_engine_knows_is_hidden() -> None:
    assert decoder().push(out("abc", "stop", stop_reason=99)).text == "ab"


@pytest.mark.parametrize("pieces", [["one END two"], ["one", " E", "N", "D two"], list("one END two")])
def test_a_stop_string_ends_the_text_and_never_leaks(pieces: list[str]) -> None:
    choice = decoder(stop_strings=["END"])
    assert read(choice, *[out(piece) for piece in pieces])[0] == "one "
    assert choice.finish_reason == "stop"
    assert choice.stopped_early
    assert choice.completion_tokens == 7


def test_a_stop_string_that_was_none_comes_out() -> None:
    assert read(decoder(stop_strings=["END"]), out("an E"), out("gg"))[0] == "an Egg"
    assert read(decoder(stop_strings=["END"]), out("an E"), out("N", "length"))[0] == "an EN"
    assert read(decoder(stop_strings=["END"]), out("an E"), out([EOS], "eos"))[0] == "an E"


def test_a_stop_string_is_shown_when_asked_for() -> None:
    choice = decoder(stop_strings=["END"], include_stop=True)
    assert read(choice, out("a E"), out("ND b"))[0] == "a END"


def test_a_stop_string_before_min_tokens_does_not_count() -> None:
    assert read(decoder(stop_strings=["a"], min_tokens=2), *[out(c) for c in "abcad"])[0] == "abc"


def test_the_stop_reason_is_the_stop_string() -> None:
    choice = decoder(stop_strings=["END"])
    assert read(choice, out("x"), out("EN"), out("D"))[1].stop_reason == "END"


@pytest.mark.parametrize("pieces", [["abcdef"], ["ab", "cdef"], list("abcdef")])
def test_the_token_limit_holds_whatever_the_engine_does(pieces: list[str]) -> None:
    choice = decoder(max_tokens=4)
    assert read(choice, *[out(piece) for piece in pieces])[0] == "abcd"
    assert choice.finish_reason == "length"
    assert choice.stopped_early
    assert choice.completion_tokens == 4


def test_the_engine_s_own_word_counts_at_the_limit() -> None:
    choice = decoder(max_tokens=2)
    assert choice.push(out("ab", "content_filter")).finish_reason == "content_filter"
    assert not choice.stopped_early


def test_half_a_character_at_the_end_comes_out_as_a_replacement() -> None:
    assert read(decoder(), out([65, 0xE2, 0x82]), out([], "length"))[0] == "A\ufffd"


def test_text_of_an_engine_that_makes_text_is_taken_as_it_is() -> None:
    choice = decoder(stop_strings=["END"])
    usage = CompletionUsage(5, 7, 12, PromptTokensDetails(4))
    last = EngineOutput(text="text", finish_reason="stop", completion_usage=usage)
    assert read(choice, EngineOutput(text="some "), last)[0] == "some text"
    assert choice.completion_tokens == 7
    assert choice.cached_tokens == 4


def test_cached_tokens_are_noted() -> None:
    choice = decoder()
    choice.push(out("a", completion_usage=CompletionUsage(5, 1, 6, PromptTokensDetails(3))))
    assert (choice.cached_tokens, choice.completion_tokens) == (3, 1)


@given(
    st.lists(st.sampled_from(["a", "b", "é", "🙂", "ab", "END", "E", "N", "D"]), max_size=12),
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.sampled_from([[], ["END"], ["ab", "é"], ["🙂b"]]),
    st.booleans(),
)
def test_the_text_does_not_depend_on_how_tokens_come(
    words: list[str], sizes: list[int], stops: list[str], with_logprobs: bool
) -> None:
    data = list("".join(words).encode())
    logprobs = LogprobFormat(Bytes(), 1, True) if with_logprobs else None
    whole = decoder(stop_strings=stops, logprobs=logprobs)
    pieces = decoder(stop_strings=stops, logprobs=logprobs)
    expected, _ = read(whole, logged(data, "length"))
    texts = []
    start = 0
    entries = 0
    while pieces.finish_reason is None:
        size = sizes[start % len(sizes)]
        end = start + size
        delta = pieces.push(logged(data[start:end], "length" if end >= len(data) else None))
        texts.append(delta.text)
        assert not with_logprobs or isinstance(delta.logprobs, ChatLogprobs | None)
        entries += len(delta.logprobs.content) if isinstance(delta.logprobs, ChatLogprobs) else 0
        start = end
    assert "".join(texts) == expected
    assert all(stop not in expected for stop in stops)
    assert pieces.completion_tokens == whole.completion_tokens
    if with_logprobs and pieces.finish_reason == "length":
        assert entries == len(data)


# --- log-probabilities


def logged(ids: list[int], finish: FinishReason | None = None) -> EngineOutput:
    """Each token with log-probability -1 and one worse alternative."""
    tops = [[TopLogprob(64, -2.0), TopLogprob(token, -1.0)] for token in ids]
    return EngineOutput(token_ids=ids, finish_reason=finish, log_probs=[-1.0] * len(ids), top_logprobs=tops)


def test_chat_logprobs_have_openai_s_form() -> None:
    choice = decoder(logprobs=LogprobFormat(Bytes(), 1, True))
    found = choice.push(logged([65])).logprobs
    assert isinstance(found, ChatLogprobs)
    (entry,) = found.content
    assert (entry.token, entry.logprob, entry.bytes) == ("A", -1.0, [65])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("A", -1.0)]


def test_completion_logprobs_have_openai_s_form() -> None:
    choice = decoder(logprobs=LogprobFormat(Bytes(), 2, False))
    choice.push(logged([65, 66]))
    found = choice.push(logged([67])).logprobs
    assert found == CompletionLogprobs(["C"], [-1.0], [{"C": -1.0, "@": -2.0}], [2])


def test_the_chosen_token_is_among_the_alternatives_of_a_completion() -> None:
    choice = decoder(logprobs=LogprobFormat(Bytes(), 1, False))
    worse = EngineOutput(token_ids=[65], log_probs=[-3.0], top_logprobs=[[TopLogprob(66, -0.5), TopLogprob(65, -3.0)]])
    found = choice.push(worse).logprobs
    assert isinstance(found, CompletionLogprobs)
    assert found.top_logprobs == [{"B": -0.5, "A": -3.0}]


def test_tokens_can_be_named_by_id() -> None:
    choice = decoder(logprobs=LogprobFormat(Bytes(), 1, True, as_token_ids=True))
    found = choice.push(logged([65])).logprobs
    assert isinstance(found, ChatLogprobs)
    assert found.content[0].token == "token_id:65"


def test_an_infinite_logprob_becomes_a_number_json_has() -> None:
    choice = decoder(logprobs=LogprobFormat(Bytes(), 0, True))
    for value in (float("-inf"), float("nan")):
        found = choice.push(EngineOutput(token_ids=[65], log_probs=[value])).logprobs
        assert isinstance(found, ChatLogprobs)
        assert found.content[0].logprob == -9999.0


def test_logprobs_wait_for_their_text_and_never_leak_a_stop_string() -> None:
    choice = decoder(stop_strings=["END"], logprobs=LogprobFormat(Bytes(), 0, True))
    names = []
    for char in "aENbEND":
        found = choice.push(logged(list(char.encode()))).logprobs
        names.append("".join(entry.token for entry in found.content) if isinstance(found, ChatLogprobs) else None)
    assert names == ["a", None, None, "ENb", None, None, None]


def test_the_hidden_end_token_has_no_entry() -> None:
    choice = decoder(logprobs=LogprobFormat(Bytes(), 0, True))
    found = choice.push(logged([65, EOS], "eos")).logprobs
    assert isinstance(found, ChatLogprobs)
    assert [entry.token for entry in found.content] == ["A"]


def test_an_engine_without_logprobs_cannot_answer_a_request_for_them() -> None:
    choice = decoder(logprobs=LogprobFormat(Bytes(), 0, True))
    delta = choice.push(out("a"))
    assert delta.finish_reason == "error"
    assert choice.stopped_early
    assert isinstance(choice.error, InvalidArgument)


# --- echo and tools


def test_an_echo_begins_the_text() -> None:
    choice = decoder(echo=Echo("prompt ", [], []))
    assert read(choice, out("a"), out("b", "length"))[0] == "prompt ab"


def test_an_echo_has_logprobs_and_moves_the_offsets() -> None:
    plan = {"echo": Echo("PQ", [80, 81], [1, 1]), "logprobs": LogprobFormat(Bytes(), 1, False)}
    choice = decoder(**plan)
    first = logged([65])
    first.prompt_logprobs = [None, [TopLogprob(81, -0.25)]]
    found = choice.push(first).logprobs
    assert found == CompletionLogprobs(
        ["P", "Q", "A"], [None, -0.25, -1.0], [None, {"Q": -0.25}, {"A": -1.0}], [0, 1, 2]
    )


def test_a_forced_tool_call_replaces_the_text() -> None:
    choice = decoder(tools=ForcedTools({}, "f"))
    first, last = choice.push(out('{"a"')), choice.push(out(":1}", "stop"))
    assert (first.text, last.text, last.finish_reason) == ("", "", "stop")
    assert first.tool_calls is not None
    assert last.tool_calls is not None
    assert first.tool_calls[0].function.name == "f"
    assert last.tool_calls[0].function.arguments == ":1}"


def test_required_calls_end_with_tool_calls() -> None:
    choice = decoder(tools=ForcedTools({}))
    choice.push(out('[{"name":"f","parameters"'))
    last = choice.push(out(":{}}]", "stop"))
    assert last.finish_reason == "tool_calls"
    assert last.tool_calls is not None


def test_required_calls_cut_by_the_limit_stay_text() -> None:
    choice = decoder(tools=ForcedTools({}))
    last = choice.push(out('[{"name"', "length"))
    assert (last.text, last.finish_reason, last.tool_calls) == ('[{"name"', "length", None)
