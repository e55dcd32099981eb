"""Where may a text be cut so that the tokens of its parts, joined, are the tokens of the whole?

Three kinds of place are used, each only where it is proved for the tokenizer at hand:

- *after a special token*: the text is split at special tokens before anything else happens;
- *before a space* that follows a solid character, and *after a newline* that a letter follows: the pre-tokenizer never
  joins what lies on the two sides (`dynamo.llm.split_pattern`), and Unicode's NFC never changes across a space or
  newline. Words are tokenized each alone, so nothing else can.

Added tokens are looked for before words are, so those that could reach over a place, or swallow the space there,
rule that kind of place out.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dynamo.llm.split_pattern import NOWHERE, Places, places
from dynamo.llm.tokenizer_config import AddedTokenSpec

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the `ByteLevel` pre-tokenizer of `tokenizers` splits by when `use_regex` is set."""
_CLASSES_ONLY = Places(before_space=True, before_space_met=False, after_newline=True, after_newline_met=False)
"""A step whose matches are digits or punctuation alone."""
_PARTING_TOKENS = 64  # a search looks for each of them at every `<`, and a chat has a handful
_LETTERS = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"  # Latin, Kana, Han, Hangul
_LETTER = re.compile(f"[{_LETTERS}]")
_SPACE_INSIDE = re.compile(r"\S ")
_LETTER_AFTER_NEWLINE = re.compile(rf"\n[{_LETTERS}]")


@dataclass(frozen=True)
class Cuts:
    """Places where a text may be cut. `words` is None where only special tokens are known to part the text.

    `anywhere` finds the end of a part: the cut is at the *end* of its match. `words` matches the empty string at
    every cut that needs no look at special tokens. With `plain_spaces` every space after a solid character is one.
    `specials`, if any, matches special tokens that may be cut off on both sides.
    """

    anywhere: "re.Pattern[str]"
    words: "re.Pattern[str] | None"
    plain_spaces: bool = False
    specials: "re.Pattern[str] | None" = None


def _parting_tokens(specs: Sequence[AddedTokenSpec]) -> list[str]:
    """A few tokens that, wherever their text stands, are found exactly there: no other token overlaps them.

    Those with a digit in them are reserved for later or name something, and do not part messages.
    """
    contents = {spec.content for spec in specs}
    everything = "\0".join(contents)
    ends = {content[i:] for content in contents for i in range(1, len(content))}

    def alone(content: str) -> bool:
        overlapped = any(content[:i] in ends for i in range(1, len(content) + 1))
        return not overlapped and "\0" not in content and everything.count(content) == 1

    likely = (spec.content for spec in specs if not spec.rstrip and not any(map(str.isdigit, spec.content)))
    return list(islice(filter(alone, likely), _PARTING_TOKENS))


def _spellings(specs: Iterable[AddedTokenSpec]) -> list[str]:
    return [text for spec in specs for text in {spec.content, unicodedata.normalize("NFC", spec.content)}]


def make_cuts(specs: Sequence[AddedTokenSpec], split: Places, special_part: bool = True) -> Cuts | None:
    """Cuts of a tokenizer with these added tokens; None if no place is known.

    `split` tells what the pre-tokenizer's patterns allow, and `special_part` whether text after a special token is
    treated as if it were a text of its own.
    """
    if any(spec.single_word for spec in specs):
        return None  # whether such a token is one depends on both its neighbours
    texts = _spellings(specs)
    kinds: list[str] = []
    swallowing = sorted({text[-1] for text in _spellings(spec for spec in specs if spec.rstrip) if text})
    spaces = split.before_space and split.before_space_met and not any(map(_SPACE_INSIDE.search, texts))
    if spaces:
        kinds.append(rf"(?<=[^\s{re.escape(''.join(swallowing))}])(?= )")
    lstripped = _spellings(spec for spec in specs if spec.lstrip)
    if (
        split.after_newline
        and split.after_newline_met
        and not any(map(_LETTER_AFTER_NEWLINE.search, texts))
        and not any(map(_LETTER.match, lstripped))
    ):
        kinds.append(rf"(?<=\n)(?=[{_LETTERS}])")
    words = re.compile("|".join(kinds)) if kinds else None
    parting = _parting_tokens([spec for spec in specs if not spec.normalized]) if special_part else []
    kinds += map(re.escape, parting)
    if not kinds:
        return None
    swallow_before = {spec.content for spec in specs if spec.lstrip}
    apart = "|".join(re.escape(token) for token in parting if token not in swallow_before)
    specials = re.compile(f"({apart})") if apart else None
    return Cuts(re.compile("|".join(kinds)), words, plain_spaces=spaces and not swallowing, specials=specials)


def split_places(pre_tokenizer: Mapping[str, Any] | None) -> Places:
    """What a pre-tokenizer, given as the library's own JSON, allows; all False if some step is not known."""
    if pre_tokenizer is None:
        return NOWHERE
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    found = [_step_places(step) for step in steps]
    prefixed = any(step.get("add_prefix_space") for step in steps)
    return Places(
        before_space=all(step.before_space for step in found),
        before_space_met=any(step.before_space_met for step in found),
        # A part that begins with a letter would get a space in front that it has not in the whole.
        after_newline=all(step.after_newline for step in found) and not prefixed,
        after_newline_met=any(step.after_newline_met for step in found),
    )


def _step_places(step: Mapping[str, Any]) -> Places:
    kind = step["type"]
    if kind == "ByteLevel":
        return places(GPT2_PATTERN) if step.get("use_regex", True) else _CLASSES_ONLY
    if kind == "Split" and "Regex" in step["pattern"] and step["behavior"] in ("Isolated", "Removed"):
        return places(step["pattern"]["Regex"])
    if kind == "Digits" or (kind == "Punctuation" and step.get("behavior") == "Isolated"):
        return _CLASSES_ONLY
    return NOWHERE


def _types(spec: Any) -> Iterable[str]:
    """Every `type` in a pipeline's JSON."""
    if isinstance(spec, dict):
        if isinstance(spec.get("type"), str):
            yield spec["type"]
        for value in spec.values():
            yield from _types(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _types(value)


def _is_first_only(spec: Any) -> bool:
    """Whether some step treats the first part of a text in its own way."""
    if isinstance(spec, dict):
        if spec.get("type") == "Metaspace" and spec.get("prepend_scheme") == "first":
            return True
        return any(map(_is_first_only, spec.values()))
    return isinstance(spec, list) and any(map(_is_first_only, spec))


def pipeline_cuts(
    specs: Sequence[AddedTokenSpec], normalizer: bytes | None, pre_tokenizer: bytes | None, random_merges: bool
) -> Cuts | None:
    """Cuts of a `tokenizer.json` pipeline, its parts given as the library's own JSON.

    `random_merges`: the model drops merges at random (BPE dropout), so that no two encodings need agree.
    """
    normal = json.loads(normalizer) if normalizer else None
    splitter = json.loads(pre_tokenizer) if pre_tokenizer else None
    if random_merges:
        return None
    keeps_places = set(_types(normal)) <= {"NFC", "Sequence"}
    split = split_places(splitter) if keeps_places else NOWHERE
    return make_cuts(specs, split, special_part=not _is_first_only(splitter))
