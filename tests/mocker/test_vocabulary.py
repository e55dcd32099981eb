"""What a simulated model says."""

import pytest

from dynamo.llm.tokenizer import Tokenizer
from dynamo.mocker import vocabulary
from dynamo.runtime.errors import InvalidArgument


def test_only_ordinary_tokens_of_whole_printable_text_are_said(model_dir):
    tokenizer = Tokenizer.load(model_dir)
    ids = vocabulary.sayable_tokens(model_dir)
    assert len(ids) > 100
    assert tokenizer.special_ids.isdisjoint(ids)
    assert "\ufffd" not in tokenizer.decode(ids)


def test_a_large_vocabulary_is_sampled_evenly(model_dir, monkeypatch):
    size = Tokenizer.load(model_dir).vocab_size
    monkeypatch.setattr(vocabulary, "MAX_TOKENS", size // 10)
    ids = vocabulary.sayable_tokens(model_dir)
    assert len(ids) <= size // 10 + 1
    assert max(ids) > size * 0.9


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json"):
        vocabulary.sayable_tokens(tmp_path)
