"""Does the segment cache give this tokenizer's own tokens, on texts chosen to show it if not?

The cuts are proved from the tokenizer's description; this is the check, at load, that the description was read
rightly.
"""

from collections.abc import Callable, Sequence
from itertools import product

from dynamo.llm.segment_cache import EncodePieces, SegmentCache
from dynamo.llm.text_cuts import Cuts

_PART_CHARS = 8  # small, so that the short texts here are cut wherever they may be
_LIMIT_BYTES = 2**20
_SPECIAL_TRIED = 6
_TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 1234567 times, isn't it? WE'LL see, they'Ve said.",
    "def f(x):\n    return x + 1  # a comment\n\n\nclass A:\n\tpass\r\n\r\n  \n \t mixed \n  end ",
    "spaces:   three,  two, one \u00a0no-break \u3000wide \u2003em\x0bvt\x1cfs x\u0085y",
    "caf\u00e9 cafe\u0301 A\u030angstr\u00f6m \u0301start \u1100\u1161\u11a8 \uac01 \u212b \u037e",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\n\u4eca\u5929 \u5929\u6c14\n\n",
    "\u65e5\u672c\u8a9e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4\n\uac00",
    "\U0001f9d1\u200d\U0001f680 emoji \U0001f44d\U0001f3fd! \U0001f1e9\U0001f1ea 3\ufe0f\u20e3",
    "0 00 000 0000 1,000,000.00 x1y2 3 4 \u0663\u0664 \u00bd 12 345",
    '{"a": [1, 2], "b": "c\\n d"} <tag attr="x"> </tag> http://a.b/c?d=e f@g.h $5 50%',
    "a\nb\n c\n\nd \ne\n \nf.\ng,\n\nh)\n i;\r\nj \r\nk",
)
_JOINTS = ("", " ", "  ", "\n", "x", " x", "x ", ".", " .")


def check_texts(special: Sequence[str]) -> list[str]:
    """The texts that are compared, with these special tokens among them."""
    around = [
        f"word{before}{token}{after}word other"
        for token, before, after in product(special[:_SPECIAL_TRIED], _JOINTS, _JOINTS)
    ]
    return [*_TEXTS, "".join(_TEXTS), " ".join(_TEXTS), "\n".join(_TEXTS), *around, "".join(special[:_SPECIAL_TRIED])]


def first_difference(
    cuts: Cuts,
    encode: Callable[[str], list[int]],
    encode_pieces: EncodePieces,
    token_bytes: Callable[[int], bytes] | None,
    special: Sequence[str],
) -> str | None:
    """The first text whose tokens by a fresh cache are not those of `encode`, None if there is none."""
    cache = SegmentCache(cuts, encode_pieces, token_bytes, _LIMIT_BYTES, _PART_CHARS)
    for text in check_texts(special):
        # Twice: once as new text, once as text that is known.
        if cache.encode(text) != (plain := encode(text)) or cache.encode(text) != plain:
            return text
    return None
