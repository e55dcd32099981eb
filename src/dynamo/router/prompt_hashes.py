"""Which hashes do a prompt's blocks have, if much of the prompt was hashed before, or nobody asks for most of them?

Hashes of blocks come in chains, so a long prompt is hashed from its start and only as far as somebody looks: one that
nobody holds, by one chunk of tokens. Chats resend their history, and many prompts begin alike. The hashes of a chunk
follow from its tokens and the hash before it: chunks that were seen are looked up, about ten times faster than hashed
anew. A chunk is known by 128 bits of a fast hash; blocks by 64 of the same, so nothing gets less certain.

Ten times faster again is where the tokenizer knew a prompt's beginning, too: it gives the same objects for the same
parts of text (`dynamo.llm.segment_cache.TokenIds`), whose tokens need not even be looked at.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from struct import Struct
from time import perf_counter
from typing import overload

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from dynamo.llm.block_hash import PAIR, SEED, hash_seed, token_bytes
from dynamo.llm.segment_cache import TokenIds

CHUNK_TOKENS = 512  # fewer: more lookups; more: more of a new turn is hashed anew
MAX_CHUNKS = 4096  # of a generation: 2 M tokens; with the one before it 12 MB
MAX_PARTS = 8192  # 2 M tokens, which the tokenizer's cache keeps anyway, and their hashes, 5 MB; then all are forgotten
_TOKEN_BYTES = 4

Key = tuple[int, bytes]  # the hash before the chunk, and the tokens' digest


class _Part:
    """A part of text after certain others, by which it is found."""

    __slots__ = ("after", "end", "hashes", "ids")

    def __init__(self, ids: tuple[int, ...], end: int, hashes: list[int]) -> None:
        self.ids = ids
        self.end = end
        """Tokens up to its end."""
        self.hashes = hashes
        """Of the blocks that end in it."""
        self.after: dict[int, _Part] = {}
        """By the identity of their ids: the parts that have followed it."""


class PromptHashes:
    """Hashes prompts for one block size. Keeps what it used last: two generations, the older one dropped whole."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.chunk_tokens = max(8, CHUNK_TOKENS // block_size) * block_size
        self._unpacks = [
            Struct(f"{block_size * _TOKEN_BYTES}s" * blocks).unpack_from
            for blocks in range(self.chunk_tokens // block_size + 1)
        ]
        """By a number of blocks: what parts so many of them."""
        self._young: dict[Key, list[int]] = {}
        self._old: dict[Key, list[int]] = {}
        self._beginnings: dict[int, _Part] = {}
        """By the seed: what all parts come after."""
        self._parts = 0

    def of(
        self, token_ids: Sequence[int], lora_name: str | None = None, cache_namespace: str | None = None
    ) -> Sequence[int]:
        """The sequence hashes of the full blocks. The tokens must not change while these are used.

        Raises InvalidArgument for a token that is not a u32; in a prompt of several chunks, once it is looked so far.
        """
        seed = hash_seed(lora_name, cache_namespace) if lora_name or cache_namespace else SEED
        if len(token_ids) < self.chunk_tokens:
            return self._chain(token_bytes(token_ids), len(token_ids) // self.block_size, seed, None)
        hashes = LazyHashes(self, token_ids, seed)
        hashes[0]  # of most prompts no more is looked at, and here a token that is none can still be refused
        return hashes

    def timed(
        self, token_ids: Sequence[int], lora_name: str | None = None, cache_namespace: str | None = None
    ) -> tuple[list[int], float]:
        """All of the same, and the milliseconds it took."""
        start = perf_counter()
        hashes = list(self.of(token_ids, lora_name, cache_namespace))
        return hashes, (perf_counter() - start) * 1e3

    def chunk(self, token_ids: Sequence[int], seed: int, parent: int | None) -> list[int]:
        """The sequence hashes of up to a chunk of tokens after `parent`. Raises InvalidArgument."""
        data = token_bytes(token_ids)
        if len(token_ids) < self.chunk_tokens:
            return self._chain(data, len(token_ids) // self.block_size, seed, parent)
        key = (seed if parent is None else parent, xxh3_128_digest(data))
        found = self._young.get(key)
        if found is None:
            found = self._old.get(key) or self._chain(data, self.chunk_tokens // self.block_size, seed, parent)
            if len(self._young) >= MAX_CHUNKS:
                self._old, self._young = self._young, {}
            self._young[key] = found
        return found

    def beginning(self, seed: int) -> _Part:
        """The part before the first."""
        return self._beginnings.get(seed) or self._beginnings.setdefault(seed, _Part((), 0, []))

    def learn(self, before: _Part, ids: tuple[int, ...], known: list[int]) -> _Part:
        """Remember a part, of whose prompt at least the blocks that end in it are `known`."""
        if self._parts >= MAX_PARTS:
            self._parts = 0
            self._beginnings = {}
        self._parts += 1
        end, size = before.end + len(ids), self.block_size
        part = before.after[id(ids)] = _Part(ids, end, known[before.end // size : end // size])
        return part

    def _chain(self, data: bytes, blocks: int, seed: int, parent: int | None) -> list[int]:
        digest, pack = xxh3_64_intdigest, PAIR.pack
        hashes = []
        for local in map(digest, self._unpacks[blocks](data), repeat(seed)):
            parent = local if parent is None else digest(pack(parent, local), SEED)
            hashes.append(parent)
        return hashes


class LazyHashes(Sequence[int]):
    """The sequence hashes of a prompt, hashed as far as they are looked at."""

    __slots__ = ("_count", "_hashes_of", "_known", "_next", "_parts", "_reached", "_seed", "_step", "_token_ids")

    def __init__(self, hashes_of: PromptHashes, token_ids: Sequence[int], seed: int) -> None:
        self._hashes_of = hashes_of
        self._token_ids = token_ids
        self._seed = seed
        self._count = len(token_ids) // hashes_of.block_size
        self._known: list[int] = []
        self._parts: Sequence[tuple[int, ...]] = token_ids.parts if isinstance(token_ids, TokenIds) else ()
        self._next = 0
        """Of the parts, the first that is not remembered, which comes after ..."""
        self._reached = hashes_of.beginning(seed)
        if self._parts:
            self._look_up()
        self._step = 1 if self._known else hashes_of.chunk_tokens // hashes_of.block_size
        """Blocks to hash next at least. Behind a remembered beginning a prompt is often one of its own from the first
        block on; so little is hashed there at first, and then twice as much each time."""

    def _look_up(self) -> None:
        """Know what is remembered of the parts that the prompt begins with."""
        reached, known = self._reached, self._known
        for ids in self._parts:
            part = reached.after.get(id(ids))
            if part is None or part.ids is not ids:
                break
            reached = part
            known += part.hashes
            self._next += 1
        self._reached = reached

    def _hash_to(self, end: int) -> None:
        """Know at least so many."""
        known, hashes_of = self._known, self._hashes_of
        while len(known) < end:
            at, blocks = len(known) * hashes_of.block_size, max(self._step, end - len(known))
            self._step *= 2
            part = self._token_ids[at : at + min(blocks * hashes_of.block_size, hashes_of.chunk_tokens)]
            known += hashes_of.chunk(part, self._seed, known[-1] if known else None)
        if self._next < len(self._parts):
            self._remember()

    def _remember(self) -> None:
        """Remember the parts that are hashed by now."""
        size, count = self._hashes_of.block_size, len(self._known)
        for ids in self._parts[self._next :]:
            if (self._reached.end + len(ids)) // size > count:
                break
            self._reached = self._hashes_of.learn(self._reached, ids, self._known)
            self._next += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            self._hash_to(stop if step > 0 else start + 1)
            return [self._known[i] for i in range(start, stop, step)]
        known = self._known
        if 0 <= index < len(known):
            return known[index]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        self._hash_to(index + 1)
        return known[index]

    def __iter__(self) -> Iterator[int]:
        self._hash_to(self._count)
        return iter(self._known)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as a list's
