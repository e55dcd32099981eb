"""What does one routing decision cost? `python benchmarks/route_decision.py > route_decision.json`.

The whole way of a prompt of 10,000 tokens through the router, for each number of workers and each policy: hashing it
into blocks of 64, finding who holds its prefix, weighing every worker; then booking it and closing the booking. Every
worker is busy with requests that share a system prompt; prompts share that, half of them go on with a conversation
that two workers hold. CPU time of this thread (`time.thread_time`), so that a machine shared with others does not
show; the best of several rounds' medians, since a shared cache does.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.kv_events import KvEventData, Stored, StoredBlock
from dynamo.router.config import KvRouterConfig
from dynamo.router.policies import POLICIES
from dynamo.router.scheduler import KvScheduler
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import RouteRequest, WorkerKey, WorkerLimits

PROMPT_TOKENS = 10_000
BLOCK_SIZE = 64
SYSTEM_TOKENS = 25 * BLOCK_SIZE
CONVERSATIONS = 200
ACTIVE_REQUESTS = 8  # at each worker
VOCABULARY = 150_000


class Fleet:
    """Workers with caches and load, and prompts for them."""

    def __init__(self, workers: int, policy: str, seed: int = 1) -> None:
        self.rnd = random.Random(seed)
        self.index = TierIndex()
        config = KvRouterConfig(router_policy=policy)
        self.scheduler = KvScheduler(BLOCK_SIZE, config, self.index, rng=random.Random(seed))
        self.system = self.tokens(SYSTEM_TOKENS)
        self.conversations = [self.tokens(6000) for _ in range(CONVERSATIONS)]
        for i in range(workers):
            self.scheduler.add_worker(WorkerKey(i), WorkerLimits(100_000, 8192, 256))
            self.store(WorkerKey(i), self.system)
        for conversation in self.conversations:
            for i in self.rnd.sample(range(workers), 2):
                self.store(WorkerKey(i), self.system + conversation)
        for i in range(workers * ACTIVE_REQUESTS):
            request = self.request(f"active-{i}", self.prompt(i))
            self.scheduler.book(request, self.scheduler.select(request, 0.0), 0.0)
            if i % 2:
                self.scheduler.prefill_done(request.request_id, 1.0)

    def tokens(self, count: int) -> list[int]:
        """Random ones."""
        return [self.rnd.randrange(VOCABULARY) for _ in range(count)]

    def prompt(self, number: int) -> list[int]:
        """A new one; every second goes on with a conversation."""
        known = self.system + (self.rnd.choice(self.conversations) if number % 2 else [])
        return known + self.tokens(PROMPT_TOKENS - len(known))

    def store(self, worker: WorkerKey, tokens: list[int]) -> None:
        """Let a worker hold these."""
        local = compute_block_hash_for_seq(tokens, BLOCK_SIZE)
        blocks = [StoredBlock(*pair) for pair in zip(sequence_hashes(local), local, strict=True)]
        self.index.apply(worker, "device", KvEventData(stored=Stored(blocks)))

    @staticmethod
    def request(name: str, tokens: list[int]) -> RouteRequest:
        """A request as the frontend makes it: with hashing."""
        hashes = sequence_hashes(compute_block_hash_for_seq(tokens, BLOCK_SIZE))
        return RouteRequest(request_id=name, token_count=len(tokens), sequence_hashes=hashes)


def measure(workers: int, policy: str, rounds: int, per_round: int) -> dict[str, Any]:
    """Microseconds of CPU for each part."""
    fleet = Fleet(workers, policy)
    scheduler, clock = fleet.scheduler, time.thread_time_ns
    prompts = [fleet.prompt(i) for i in range(per_round)]
    medians: dict[str, list[float]] = {}
    worst: list[float] = []
    for _ in range(rounds):
        parts: dict[str, list[float]] = {"hash": [], "select": [], "book": [], "free": [], "decision": []}
        for i, prompt in enumerate(prompts):
            start = clock()
            request = fleet.request(f"r{i}", prompt)
            hashed = clock()
            decision = scheduler.select(request, 2.0)
            chosen = clock()
            scheduler.book(request, decision, 2.0)
            booked = clock()
            scheduler.prefill_done(request.request_id, 2.1)
            scheduler.free(request.request_id)
            freed = clock()
            for name, ns in (
                ("hash", hashed - start),
                ("select", chosen - hashed),
                ("book", booked - chosen),
                ("free", freed - booked),
                ("decision", chosen - start),
            ):
                parts[name].append(ns / 1000)
        for name, values in parts.items():
            medians.setdefault(f"{name}_us", []).append(statistics.median(values))
        worst.append(sorted(parts["decision"])[int(0.99 * per_round)])
    return {
        "workers": workers,
        "policy": policy,
        **{name: round(min(values), 1) for name, values in medians.items()},
        "decision_p99_us": round(min(worst), 1),
    }


def clock_cost_us() -> float:
    """What one look at the clock costs; each figure has about one in it."""
    looks: list[Callable[[], int]] = [time.thread_time_ns] * 1000
    start = time.thread_time_ns()
    for look in looks:
        look()
    return (time.thread_time_ns() - start) / 1e6


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=100, help="a round")
    options = parser.parse_args()
    results = [
        measure(workers, policy, options.rounds, options.requests)
        for workers in options.workers
        for policy in options.policies
    ]
    print(
        json.dumps(
            {
                "prompt_tokens": PROMPT_TOKENS,
                "block_size": BLOCK_SIZE,
                "clock_us": round(clock_cost_us(), 2),
                "results": results,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
