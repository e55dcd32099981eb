"""Which tokens can a simulated model say?"""

from pathlib import Path

from dynamo.llm.tokenizer import Tokenizer


def sayable_tokens(directory: Path) -> list[int]:
    """Ids of all ordinary tokens that are whole printable text: no special tokens, no parts of characters.

    If the vocabulary has no such token, all ordinary tokens. Reads the tokenizer, so call it off the event loop.
    Raises InvalidArgument naming the tokenizer file that is missing or broken.
    """
    tokenizer = Tokenizer.load(directory)
    ordinary = [
        id_
        for id_ in range(tokenizer.vocab_size)
        if id_ not in tokenizer.special_ids and id_ not in tokenizer.eos_ids and tokenizer.token_bytes(id_)
    ]
    return [id_ for id_ in ordinary if _is_text(tokenizer.token_bytes(id_))] or ordinary


def _is_text(token: bytes) -> bool:
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return text.replace("\n", " ").isprintable()
