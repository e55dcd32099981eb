"""What can a router know of a prompt that only its worker will tokenize?

Token ids, where a client sends them. Of text: about how long it is, and which of its beginnings were seen before. Its
bytes are taken four at a time for tokens, which is how long tokens are on average; such blocks never equal those of
real tokens, so KV events say nothing of them, but a router that goes by what it sent where recognizes them.
"""

import msgspec

from dynamo.runtime.errors import UNDECODABLE

BYTES_A_TOKEN = 4  # of English text in common vocabularies

Raw = msgspec.Raw
_NOTHING = Raw(b"")
_decode_ids = msgspec.json.Decoder(list[int]).decode


class Asked(msgspec.Struct):
    """What has to be known of a body to send it somewhere. The prompt stays as it is."""

    model: str = ""
    stream: bool | None = None
    messages: msgspec.Raw = _NOTHING
    prompt: msgspec.Raw = _NOTHING


def prompt_tokens(asked: Asked) -> list[int]:
    """Tokens of the prompt, or what stands for them."""
    prompt = bytes(asked.prompt)
    if prompt.startswith(b"["):
        try:
            ids = _decode_ids(prompt)
        except UNDECODABLE:
            pass  # several prompts, or text: the worker says what is wrong with it, if something is
        else:
            if all(0 <= token < 1 << 32 for token in ids):
                return ids
    text = bytes(asked.messages) or prompt
    text = text[: len(text) // BYTES_A_TOKEN * BYTES_A_TOKEN]
    return memoryview(text).cast("I").tolist() or [0]
