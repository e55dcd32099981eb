"""Which tokens can a simulated model say?"""

from pathlib import Path

from dynamo.llm.tokenizer import Tokenizer

MAX_TOKENS = 16_384  # variety enough; looking at each of a quarter million would take two seconds of every start


def sayable_tokens(directory: Path) -> list[int]:
    """Ids of ordinary tokens that are whole printable text: no special tokens, no parts of characters.

    From a large vocabulary a selection, spread evenly. If none is printable, ordinary tokens as they are. Reads the
    tokenizer, so call it off the event loop. Raises InvalidArgument naming the file that is missing or broken.
    """
    tokenizer = Tokenizer.load(directory)
    every = range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // MAX_TOKENS))
    ordinary = {
        id_: text
        for id_ in every
        if id_ not in tokenizer.special_ids and id_ not in tokenizer.eos_ids and (text := tokenizer.token_bytes(id_))
    }
    return [id_ for id_, text in ordinary.items() if _is_printable(text)] or list(ordinary)


def _is_printable(token: bytes) -> bool:
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return text.replace("\n", " ").isprintable()
