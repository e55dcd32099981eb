"""Which one answer do the chunks of a worker that speaks OpenAI's language add up to?

Chunks are maps as they came from the worker; nothing in them is checked beyond what folding needs, and fields that
are not known here are taken over from where they first appear.
"""

from typing import Any

_WHOLE = {"chat.completion.chunk": "chat.completion"}  # a completion's chunks are called as the whole is


class ChunkFold:
    """The chunks of one answer so far. Feed `add` in order, then take `whole`."""

    def __init__(self) -> None:
        self._answer: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        """One more chunk; also a whole answer, which is its own fold."""
        for name, value in chunk.items():
            if name == "choices":
                for choice in value or ():
                    self._add_choice(choice)
            elif value is not None and (name == "usage" or self._answer.get(name) is None):
                self._answer[name] = value  # usage may come several times: the last is the sum

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index") or 0
        if "delta" not in choice and "text" not in choice:
            self._choices[index] = choice
            return
        whole = self._choices.setdefault(index, {"index": index})
        if "delta" in choice:
            message = whole.setdefault("message", {"role": "assistant", "content": None})
            _add_delta(message, choice["delta"] or {})
        else:
            whole["text"] = whole.get("text", "") + (choice["text"] or "")
        _add_logprobs(whole, choice.get("logprobs"))
        for name, value in choice.items():
            if name not in ("index", "delta", "text", "logprobs") and (value is not None or name not in whole):
                whole[name] = value

    @property
    def empty(self) -> bool:
        """Whether nothing came."""
        return not self._answer and not self._choices

    def whole(self) -> dict[str, Any]:
        """The answer."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            calls = choice.get("message", {}).get("tool_calls")
            if isinstance(calls, dict):
                choice["message"]["tool_calls"] = [calls[index] for index in sorted(calls)]
        kind = self._answer.get("object")
        return {**self._answer, "object": _WHOLE.get(str(kind), kind), "choices": choices}


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            for call in value or ():
                _add_call(message.setdefault("tool_calls", {}), call)
        elif name == "role":
            message["role"] = value or message["role"]
        elif isinstance(value, str):
            message[name] = (message.get(name) or "") + value
        elif value is not None or name not in message:
            message[name] = value


def _add_call(calls: dict[int, dict[str, Any]], piece: dict[str, Any]) -> None:
    function = piece.get("function") or {}
    call = calls.setdefault(
        piece.get("index") or 0, {"id": None, "type": "function", "function": {"name": None, "arguments": ""}}
    )
    call["id"] = piece.get("id") or call["id"]
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    call["function"]["arguments"] += function.get("arguments") or ""


def _add_logprobs(whole: dict[str, Any], logprobs: dict[str, Any] | None) -> None:
    """Log-probabilities are lists in a map, in both of OpenAI's forms."""
    if logprobs is None:
        whole.setdefault("logprobs", None)
        return
    known = whole.get("logprobs")
    if known is None:
        whole["logprobs"] = {name: list(v) if isinstance(v, list) else v for name, v in logprobs.items()}
        return
    for name, value in logprobs.items():
        if isinstance(value, list):
            known[name] = [*(known.get(name) or ()), *value]
