"""Is a `dynamo run` command line understood, and refused with a useful word?"""

from pathlib import Path

import pytest

from dynamo.cli.order import parse


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(words, stdin_is_terminal=True)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_words_may_stand_in_any_order() -> None:
    order = parse(["--num-workers", "3", "out=mocker", "DIR", "in=http"], stdin_is_terminal=True)
    assert (order.how, order.out, order.options.model, order.options.num_workers) == ("http", "mocker", "DIR", 3)


def test_a_terminal_chats_and_a_pipe_is_a_prompt() -> None:
    assert parse([], stdin_is_terminal=True).how == "text"
    assert parse([], stdin_is_terminal=False).how == "stdin"


def test_a_batch_names_its_file() -> None:
    order = parse(["in=batch:a/b.jsonl"], stdin_is_terminal=True)
    assert (order.how, order.batch_file) == ("batch", Path("a/b.jsonl"))


def test_engine_flags_stand_after_two_dashes() -> None:
    order = parse(["DIR", "--", "--max-num-seqs", "4", "in=x"], stdin_is_terminal=True)
    assert order.engine_flags == ["--max-num-seqs", "4", "in=x"]
    assert order.how == "text"


def test_unknown_words_are_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --num-workers?" in refused(capsys, "--num-worker", "2")
    assert "choose one of http, text, stdin" in refused(capsys, "in=htpp")


def test_zero_workers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--num-workers must be at least 1" in refused(capsys, "--num-workers", "0")


def test_two_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one" in refused(capsys, "a", "--model-path", "b")
