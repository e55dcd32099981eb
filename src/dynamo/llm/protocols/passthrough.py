"""What do the frontend and a worker say to each other when the worker reads OpenAI's requests itself?

Two forms, for cards that say `ModelInput.Text`. Most workers get the request as a map, always with `stream: true`, and
answer with a stream of OpenAI's chunks as maps. A worker that also carries `OPENAI_BYTES` in its card's
`runtime_config.runtime_data` gets an `OpenAIRequest`, and answers with one `OpenAIHead` and then the body in pieces
of bytes: nothing on the way reads or changes them.
"""

import msgspec

OPENAI_BYTES = "openai_bytes"
"""Key in a card's `runtime_data`: true for a worker that takes `OpenAIRequest`."""

Headers = list[tuple[str, str]]


class OpenAIRequest(msgspec.Struct, omit_defaults=True):
    """A client's request. `path` is OpenAI's, such as `/v1/chat/completions`; `headers` are those meant for the end."""

    path: str
    body: bytes
    headers: Headers = []


class OpenAIHead(msgspec.Struct, omit_defaults=True):
    """How an answer begins. The content type is not repeated in `headers`."""

    status: int
    content_type: str
    headers: Headers = []
