"""How do vLLM's log probabilities read in `EngineOutput`'s terms?

vLLM reports a position as a row: the sampled (or prompt) token first, then the `k` likeliest tokens in order,
and beside it the rank of the first. The same token may therefore come twice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dynamo.llm.protocols.engine import TopLogprob


def position(token_ids: list[int], logprobs: list[float], rank: int, count: int) -> list[TopLogprob]:
    """The alternatives at one position, likeliest first, the sampled token among them.

    Args:
        token_ids: the sampled token, then the likeliest; at least `count + 1` long.
        logprobs: natural logarithms, aligned with `token_ids`.
        rank: of the sampled token, 1 for the likeliest.
        count: how many of the likeliest were asked for.
    """
    sampled = token_ids[0]
    top = [TopLogprob(token_ids[i], logprobs[i], i) for i in range(1, count + 1)]
    if all(entry.token_id != sampled for entry in top):
        top.append(TopLogprob(sampled, logprobs[0], rank))
    return top


def rows(arrays: Any, count: int) -> tuple[list[float], list[list[TopLogprob]] | None]:
    """(log probability of each new token, alternatives or None when `count` is 0) from vLLM's array form:
    token ids and log probabilities of shape [tokens, >= count + 1], ranks of shape [tokens]."""
    token_ids, logprobs, ranks = (part.tolist() for part in arrays[:3])
    chosen = [row[0] for row in logprobs]
    if not count:
        return chosen, None
    width = len(token_ids[0]) - 1 if token_ids else 0
    n = width if count < 0 else min(count, width)  # -1 asks for the whole vocabulary
    return chosen, [position(t, p, r, n) for t, p, r in zip(token_ids, logprobs, ranks, strict=True)]


def prompt_rows(arrays: Any, count: int) -> list[list[TopLogprob]]:
    """The positions of a prompt after its first token; of each at least the prompt's own token."""
    token_ids, logprobs, ranks = (part.tolist() for part in arrays[:3])
    width = len(token_ids[0]) - 1 if token_ids else 0
    n = width if count < 0 else min(count, width)
    return [position(t, p, r, n) for t, p, r in zip(token_ids, logprobs, ranks, strict=True)]


def from_mapping(entries: Mapping[int, Any], sampled: int | None, count: int) -> list[TopLogprob]:
    """One position from vLLM's public form, a mapping token id → (logprob, rank), likeliest first."""
    found: Iterable[TopLogprob] = (TopLogprob(int(t), float(e.logprob), e.rank) for t, e in entries.items())
    ordered = sorted(found, key=lambda entry: entry.rank or 0)
    top = ordered if count < 0 else ordered[:count]
    if sampled is not None and all(entry.token_id != sampled for entry in top):
        top.extend(entry for entry in ordered if entry.token_id == sampled)
    return top
