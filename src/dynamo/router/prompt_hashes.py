"""Which hashes do a prompt's blocks have, if much of the prompt was hashed before?

Chats resend their history, and many prompts begin alike. Hashes of blocks come in chains, so those of a chunk of
tokens follow from its tokens and the hash before it: chunks that were seen are looked up, about ten times faster than
hashed anew. A chunk is known by 128 bits of a fast hash; blocks by 64 of the same, so nothing gets less certain.
"""

from collections.abc import Sequence
from itertools import repeat
from struct import Struct
from time import perf_counter

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from dynamo.llm.block_hash import PAIR, SEED, hash_seed, sequence_hashes, token_bytes

CHUNK_TOKENS = 512  # fewer: more lookups; more: more of a new turn is hashed anew
MAX_CHUNKS = 4096  # of a generation: 2 M tokens; with the one before it 12 MB
_TOKEN_BYTES = 4

Key = tuple[int, bytes]  # the hash before the chunk, and the tokens' digest


class PromptHashes:
    """Hashes prompts for one block size. Keeps what it used last: two generations, the older one dropped whole."""

    def __init__(self, block_size: int) -> None:
        self._block_bytes = block_size * _TOKEN_BYTES
        self._chunk_bytes = max(8, CHUNK_TOKENS // block_size) * self._block_bytes
        self._unpack_chunk = Struct(f"{self._block_bytes}s" * (self._chunk_bytes // self._block_bytes)).unpack
        self._young: dict[Key, list[int]] = {}
        self._old: dict[Key, list[int]] = {}

    def of(
        self, token_ids: Sequence[int], lora_name: str | None = None, cache_namespace: str | None = None
    ) -> list[int]:
        """The sequence hashes of the full blocks. Raises InvalidArgument for a token that is not a u32."""
        data = token_bytes(token_ids)
        seed = hash_seed(lora_name, cache_namespace) if lora_name or cache_namespace else SEED
        if len(data) < self._chunk_bytes:
            return self._chain_short(data, seed, None)
        hashes: list[int] = []
        at, parent = 0, None
        for at in range(self._chunk_bytes, len(data) + 1, self._chunk_bytes):
            chunk = data[at - self._chunk_bytes : at]
            key = (seed if parent is None else parent, xxh3_128_digest(chunk))
            found = self._young.get(key)
            if found is None:
                found = self._old.get(key) or self._chain(chunk, seed, parent)
                self._keep(key, found)
            hashes += found
            parent = found[-1]
        if at < len(data):
            hashes += self._chain_short(data[at:], seed, parent)
        return hashes

    def timed(
        self, token_ids: Sequence[int], lora_name: str | None = None, cache_namespace: str | None = None
    ) -> tuple[list[int], float]:
        """The same, and the milliseconds it took."""
        start = perf_counter()
        hashes = self.of(token_ids, lora_name, cache_namespace)
        return hashes, (perf_counter() - start) * 1e3

    def _chain(self, chunk: bytes, seed: int, parent: int | None) -> list[int]:
        """The sequence hashes of a whole chunk's blocks after `parent`."""
        return sequence_hashes(list(map(xxh3_64_intdigest, self._unpack_chunk(chunk), repeat(seed))), parent)

    def _chain_short(self, data: bytes, seed: int, parent: int | None) -> list[int]:
        """The same of fewer blocks: what follows the last whole chunk."""
        step, digest, pack = self._block_bytes, xxh3_64_intdigest, PAIR.pack
        hashes = []
        for end in range(step, len(data) + 1, step):
            local = digest(data[end - step : end], seed)
            parent = local if parent is None else digest(pack(parent, local), SEED)
            hashes.append(parent)
        return hashes

    def _keep(self, key: Key, hashes: list[int]) -> None:
        if len(self._young) >= MAX_CHUNKS:
            self._old, self._young = self._young, {}
        self._young[key] = hashes
