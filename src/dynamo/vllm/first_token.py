"""How does a decode worker's engine begin with the token that the client already has?

The prefill worker's first token is the client's. The decode engine draws it once more, so that its penalties, seeds,
grammars and counts are as if it had done the whole request; this processor leaves it no other choice, where the same
numbers in another batch could have come out otherwise.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from dynamo.vllm.driver import FIRST_TOKEN


class FirstToken(LogitsProcessor):  # type: ignore[misc]
    """Bars all tokens but the given one at a request's first position."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._forced: dict[int, tuple[int, list[int]]] = {}  # row of the batch → (token, the request's output so far)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._forced, batch_update, _forced_of)
        if self._forced:
            for row in [row for row, (_, output) in self._forced.items() if output]:
                del self._forced[row]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (token, _) in self._forced.items():
            logits[row].fill_(float("-inf"))
            logits[row, token] = 0.0
        return logits


def _forced_of(params: Any, prompt: list[int] | None, output: list[int]) -> tuple[int, list[int]] | None:
    token = (params.extra_args or {}).get(FIRST_TOKEN)
    return None if token is None or output else (token, output)
