"""What must a tokenizer library offer, so that the rest never asks which one it is?"""

from typing import Protocol

from dynamo.llm.detokenizer import DecodingRules
from dynamo.llm.text_cuts import Cuts


class Backend(Protocol):
    """One loaded vocabulary. Thread-safe; `encode*` release the GIL while they work on long text."""

    special_ids: frozenset[int]
    """Tokens that `skip_special_tokens` leaves out."""
    vocab_size: int
    """Number of ids, added tokens included."""
    named: dict[str, str]
    """Named tokens (`bos_token`, …) that the vocabulary file itself tells; the configs win over them."""
    rules: DecodingRules
    """How tokens become text as they come."""
    cuts: Cuts | None
    """Where text may be cut without changing its tokens, if that is known."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of the text, with special tokens in it recognized."""
        ...

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Ids of each piece alone, without the tokens that open and close a sequence."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text of all ids at once. Unknown ids give nothing."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id whose vocabulary entry is exactly this string."""
        ...

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry as it is stored."""
        ...
