"""Which name does a block of tokens have, so that every process gives it the same?

A *local* hash names the tokens of one block; a *sequence* hash names the block with everything before it. Both are
XXH3-64, unsigned, and equal those that existing workers and routers exchange (facts rows K1 to K6).
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, repeat
from struct import Struct
from sys import byteorder
from typing import Any

from xxhash import xxh3_64_intdigest

from dynamo.runtime.errors import InvalidArgument

SEED = 1337  # part of the hash's definition: peers use it [K1]
_SALT_SEED = 1  # keeps a cache namespace apart from a LoRA of the same name [K5]
_TOKEN_BYTES = 4  # tokens are hashed as little-endian u32 [K1]
_U64_MASK = 2**64 - 1
PAIR = Struct("<QQ")  # a sequence hash, and the local hash of the block after it

BlockMmInfo = Mapping[str, Any]
"""One block's multimodal content: `{"mm_objects": [{"mm_hash": u64, "offsets": …}]}`; only the hashes count [K3]."""


def hash_seed(lora_name: str | None = None, cache_namespace: str | None = None) -> int:
    """The seed of the local hashes: 1337, moved by the adapter's name and the cache namespace (wrapping u64) [K4][K5].

    None and `""` move nothing.
    """
    seed = SEED
    if lora_name:
        seed += xxh3_64_intdigest(lora_name.encode("utf-8"), 0)
    if cache_namespace:
        seed += xxh3_64_intdigest(cache_namespace.encode("utf-8"), _SALT_SEED)
    return seed & _U64_MASK


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as they are hashed: little-endian u32. Raises InvalidArgument for one that is none."""
    packed = array("I")
    try:
        # `fromlist` is a third faster than the constructor.
        packed.fromlist(tokens if isinstance(tokens, list) else list(tokens))
    except (OverflowError, TypeError) as e:
        raise InvalidArgument(f"token ids must be integers from 0 to 2**32 - 1: {e}", "tokens") from e
    if byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


_UNPACKED_AT_ONCE = 64  # blocks; a format of so many fields unpacks twice as fast as slicing block by block


@lru_cache(maxsize=32)
def _block_formats(width: int) -> tuple[Struct, Struct]:
    return Struct(f"{width}s"), Struct(f"{width}s" * _UNPACKED_AT_ONCE)


def _blocks(data: bytes, width: int) -> Iterator[bytes]:
    """The full blocks of `width` bytes, side by side."""
    one, many = _block_formats(width)
    batched = len(data) - len(data) % many.size
    full = len(data) - len(data) % width
    view = memoryview(data)
    return chain(
        chain.from_iterable(many.iter_unpack(view[:batched])),
        chain.from_iterable(one.iter_unpack(view[batched:full])),
    )


def _windows(data: bytes, width: int, stride: int) -> Iterator[bytes]:
    """The windows of `width` bytes that begin every `stride` bytes."""
    if width == stride:
        return _blocks(data, width)
    return (data[at : at + width] for at in range(0, len(data) - width + 1, stride))


def _check_block_size(kv_block_size: int) -> None:
    if kv_block_size < 1:
        raise InvalidArgument(f"kv_block_size must be at least 1, got {kv_block_size}", "kv_block_size")


def compute_block_hash_for_seq(
    tokens: Sequence[int],
    kv_block_size: int,
    block_mm_infos: Sequence[BlockMmInfo | None] | None = None,
    lora_name: str | None = None,
    is_eagle: bool | None = None,
    cache_namespace: str | None = None,
) -> list[int]:
    """Local hashes of the full blocks of a sequence, in order; a partial tail has none.

    With `is_eagle` a block's hash covers one token more than the block, so the last block counts only when a token
    follows it. `block_mm_infos[i]` belongs to block i; further blocks have none. Raises InvalidArgument for a token
    that is not a u32, a block size below 1 or a malformed multimodal entry.
    """
    _check_block_size(kv_block_size)
    data = token_bytes(tokens)
    step = kv_block_size * _TOKEN_BYTES
    width = step + _TOKEN_BYTES if is_eagle else step
    seed = hash_seed(lora_name, cache_namespace)
    windows = _windows(data, width, step)
    if block_mm_infos:
        mixed_in = chain(map(_mm_bytes, block_mm_infos), repeat(b""))
        windows = (block + extra for block, extra in zip(windows, mixed_in, strict=False))
    return list(map(xxh3_64_intdigest, windows, repeat(seed)))


def _mm_bytes(info: BlockMmInfo | None) -> bytes:
    if info is None:
        return b""
    try:
        hashes = sorted(entry["mm_hash"] for entry in info["mm_objects"])
        return b"".join(value.to_bytes(8, "little") for value in hashes)
    except (KeyError, TypeError, AttributeError, OverflowError) as e:
        raise InvalidArgument(
            f'block_mm_infos entries are None or {{"mm_objects": [{{"mm_hash": u64, "offsets": …}}]}}: {e!r}',
            "block_mm_infos",
        ) from e


def next_sequence_hash(parent: int | None, local: int) -> int:
    """The sequence hash of a block whose parent block has `parent`; the first block has none [K2]."""
    return local if parent is None else xxh3_64_intdigest(PAIR.pack(parent, local), SEED)


def sequence_hashes(local_hashes: Sequence[int], parent: int | None = None) -> list[int]:
    """Chain local hashes: the first stays, each further is XXH3-64 of (the one before, its own local hash) [K2].

    `parent` is the sequence hash of the block before the first one, if there is one.
    """
    digest, pack = xxh3_64_intdigest, PAIR.pack
    chained: list[int] = []
    if not local_hashes:
        return chained
    last = local_hashes[0] if parent is None else digest(pack(parent, local_hashes[0]), SEED)
    chained.append(last)
    for local in local_hashes[1:]:
        last = digest(pack(last, local), SEED)
        chained.append(last)
    return chained


class BlockHasher:
    """Names the blocks of one growing sequence as they fill. Owns the tokens of the block not yet full."""

    __slots__ = ("_block_size", "_eagle", "_open", "_parent", "_seed")

    def __init__(
        self,
        kv_block_size: int,
        lora_name: str | None = None,
        is_eagle: bool | None = None,
        cache_namespace: str | None = None,
    ) -> None:
        _check_block_size(kv_block_size)
        self._block_size = kv_block_size
        self._eagle = bool(is_eagle)
        self._seed = hash_seed(lora_name, cache_namespace)
        self._parent: int | None = None
        self._open: list[int] = []

    def extend(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Add tokens; (local, sequence) hashes of the blocks that became full. Raises InvalidArgument as above."""
        self._open += tokens
        size = self._block_size
        width = size + 1 if self._eagle else size
        if len(self._open) < width:
            return []
        data = token_bytes(self._open)
        full: list[tuple[int, int]] = []
        for start in range(0, len(self._open) - width + 1, size):
            at = start * _TOKEN_BYTES
            local = xxh3_64_intdigest(data[at : at + width * _TOKEN_BYTES], self._seed)
            self._parent = next_sequence_hash(self._parent, local)
            full.append((local, self._parent))
        del self._open[: len(full) * size]
        return full
