"""What do finding and storing in the block index cost? `python benchmarks/block_index.py > block_index.json`.

A fleet's caches are filled from events like the mocker's: conversations of 850 blocks below shared system prompts, as
prefills of 128 blocks and 40 decoded ones, on one worker or on two. Then come prompts of 850 blocks, of which a
part is known. Each size runs in a process of its own; memory is what that process grew by. A machine shared with
others shows in wall times, so stores are also given by CPU time.
"""

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise

import msgspec

from dynamo.llm.block_hash import sequence_hashes
from dynamo.llm.kv_events import KvEvent, KvEventData, Removed, RouterEvent, Stored, StoredBlock
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import WorkerKey

PROMPT_BLOCKS = 850
SYSTEM_BLOCKS = 25
SYSTEM_PROMPTS = 100
PREFILL_BLOCKS = 128  # what one step of 8,192 tokens computes, in blocks of 64: the mocker's defaults
DECODED_BLOCKS = 40  # of each conversation, one event each
QUERIES = 4000


def conversation(rnd: random.Random, systems: list[list[int]]) -> list[int]:
    """Local hashes."""
    return rnd.choice(systems) + [rnd.getrandbits(64) for _ in range(PROMPT_BLOCKS - SYSTEM_BLOCKS)]


def events(local_hashes: list[int], own_names: bool, rnd: random.Random) -> Iterator[KvEventData]:
    """How a worker tells of a conversation that it computes."""
    seqs = sequence_hashes(local_hashes)
    names = seqs if own_names else [rnd.getrandbits(64) for _ in seqs]
    prefilled = len(seqs) - DECODED_BLOCKS
    cuts = [*range(0, prefilled, PREFILL_BLOCKS), *range(prefilled, len(seqs)), len(seqs)]
    for start, end in pairwise(cuts):
        blocks = [StoredBlock(*pair) for pair in zip(names[start:end], local_hashes[start:end], strict=True)]
        yield KvEventData(stored=Stored(blocks, names[start - 1] if start else None))


def rss_kb() -> int:
    """What this process holds now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024


def percentiles(values: list[float]) -> dict[str, float]:
    """In microseconds."""
    ordered = sorted(values)
    at = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "max_us": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e6, 2) for name, q in at.items()}


def timed_finds(index: TierIndex, prompts: list[list[int]]) -> dict[str, float]:
    """One find for each prompt, as a decision makes it: workers that hold equally much are told together."""
    times = []
    for prompt in prompts:
        began = time.perf_counter()
        index.groups(prompt)
        times.append(time.perf_counter() - began)
    return percentiles(times)


def fill(index: TierIndex, workers: list[WorkerKey], blocks: int, own_names: bool, rnd: random.Random) -> dict:
    """Store conversations until there are `blocks` blocks. Says what that cost, and which ones they are."""
    systems = [[rnd.getrandbits(64) for _ in range(SYSTEM_BLOCKS)] for _ in range(SYSTEM_PROMPTS)]
    decoder = msgspec.msgpack.Decoder(list[RouterEvent])
    told: list[tuple[WorkerKey, list[int]]] = []
    stored = 0
    decode_s = 0.0
    wall_s, cpu_s = {"prefilled": 0.0, "decoded": 0.0}, {"prefilled": 0.0, "decoded": 0.0}
    pending: list[bytes] = []
    before_kb = rss_kb()
    while len(index) < blocks:
        locals_ = conversation(rnd, systems)
        for worker in rnd.sample(workers, 1 if rnd.random() < 0.8 else 2):
            told.append((worker, locals_))
            batch = [
                RouterEvent(worker.worker_id, KvEvent(i, data, worker.dp_rank))
                for i, data in enumerate(events(locals_, own_names, rnd))
            ]
            pending.append(msgspec.msgpack.encode(batch))
        for payload in pending:
            began = time.perf_counter()
            decoded = decoder.decode(payload)
            decode_s += time.perf_counter() - began
            prefilled = len(decoded) - DECODED_BLOCKS
            for kind, part in (("prefilled", decoded[:prefilled]), ("decoded", decoded[prefilled:])):
                began, began_cpu = time.perf_counter(), time.process_time()
                for event in part:
                    index.apply(WorkerKey(event.worker_id, event.event.dp_rank), "device", event.event.change)
                cpu_s[kind] += time.process_time() - began_cpu
                wall_s[kind] += time.perf_counter() - began
            stored += PROMPT_BLOCKS
        pending.clear()
    grown_kb = rss_kb() - before_kb
    kept = len(told) * (PROMPT_BLOCKS * 8 + 100) + blocks * 48  # the prompts kept here, to ask for them
    return {
        "told": told,
        "stored": stored,
        "decode_blocks_per_s": round(stored / decode_s),
        "store": {
            kind: {
                "blocks_per_s": round(share * stored / wall_s[kind]),
                "per_cpu_s": round(share * stored / cpu_s[kind]),
            }
            for kind, share in (
                ("prefilled", 1 - DECODED_BLOCKS / PROMPT_BLOCKS),
                ("decoded", DECODED_BLOCKS / PROMPT_BLOCKS),
            )
        },
        "bytes_per_block": round((grown_kb * 1024 - kept) / len(index), 1),
    }


def prompts_of(told: list[tuple[WorkerKey, list[int]]], rnd: random.Random) -> list[list[int]]:
    """Sequence hashes of prompts that go on from somewhere in what is known."""
    prompts = []
    for _ in range(QUERIES):
        known = rnd.choice(told)[1]
        cut = rnd.randrange(SYSTEM_BLOCKS, PROMPT_BLOCKS)
        prompts.append(sequence_hashes(known[:cut] + [rnd.getrandbits(64) for _ in range(PROMPT_BLOCKS - cut)]))
    return prompts


def measure(workers: int, blocks: int, own_names: bool) -> dict:
    """One fleet."""
    rnd = random.Random(0)
    index = TierIndex()
    keys = [WorkerKey(i + 1) for i in range(workers)]
    filled = fill(index, keys, blocks, own_names, rnd)
    told = filled.pop("told")
    result = {"workers": workers, "blocks": len(index), "names": "sequence hashes" if own_names else "engine's own"}
    result |= filled
    prompts = prompts_of(told, rnd)
    result["levels_mean"] = round(statistics.mean(len(index.index.levels(p)) for p in prompts[:500]), 2)
    result["runs"] = len(index.index._tree.runs)  # how well blocks pack together
    result["find"] = timed_finds(index, prompts)
    deep = sequence_hashes([rnd.getrandbits(64) for _ in range(PROMPT_BLOCKS)])
    if own_names:
        result["find_where_every_worker_differs"] = find_staircase(index, keys, rnd)
        result["find_with_holes"] = find_with_holes(index, told, prompts, rnd)
    result["find_nothing"] = timed_finds(index, [deep] * QUERIES)
    result["removed_blocks_per_s"] = remove(index, told, own_names)
    return result


def find_staircase(index: TierIndex, keys: list[WorkerKey], rnd: random.Random) -> dict[str, float]:
    """The worst prompt there is: each worker holds a different length of it."""
    locals_ = [rnd.getrandbits(64) for _ in range(PROMPT_BLOCKS)]
    seqs = sequence_hashes(locals_)
    for i, key in enumerate(keys):
        length = 1 + i * PROMPT_BLOCKS // len(keys)
        index.index.store(key, None, seqs[:length], locals_[:length])
    times = timed_finds(index, [seqs] * 1000)
    for key in keys:
        index.index.remove(key, seqs[::-1])
    return times


def find_with_holes(
    index: TierIndex, told: list[tuple[WorkerKey, list[int]]], prompts: list[list[int]], rnd: random.Random
) -> dict[str, float]:
    """A hundred holes somewhere make every find look for them."""
    holed = rnd.choices(told, k=100)
    for worker, locals_ in holed:
        index.index.remove(worker, [sequence_hashes(locals_)[rnd.randrange(SYSTEM_BLOCKS, 400)]])
    times = timed_finds(index, prompts)
    for worker, locals_ in holed:
        index.index.store(worker, None, sequence_hashes(locals_), locals_)
    return times


def remove(index: TierIndex, told: list[tuple[WorkerKey, list[int]]], own_names: bool) -> int | None:
    """Evict conversations as an engine does, the end first."""
    if not own_names:
        return None
    spent, count = 0.0, 0
    for worker, locals_ in told[:400]:
        data = KvEventData(removed=Removed(sequence_hashes(locals_)[: SYSTEM_BLOCKS - 1 : -1]))
        began = time.perf_counter()
        index.apply(worker, "device", data)
        spent += time.perf_counter() - began
        count += PROMPT_BLOCKS - SYSTEM_BLOCKS
    return round(count / spent)


def main() -> None:
    """Print everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, to see that it works")
    args = parser.parse_args()
    scale = 10 if args.quick else 1
    sizes = [(64, 20_000, True), (64, 200_000, True), (64, 2_000_000, True), (1000, 2_000_000, True)]
    sizes += [(64, 2_000_000, False)]
    results = []
    for workers, blocks, own_names in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measure, (workers, max(20_000, blocks // scale), own_names)))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
