"""Where do the numbers in `radix_tree_vectors.json` come from?

From the reference implementation, `ai-dynamo` 1.6.1 of PyPI, asked through its public `dynamo.llm.RadixTree`. To make
the file anew, install that version into an environment of its own (it has the same import name as this project) and run

    REFERENCE/bin/python tests/router/data/make_radix_tree_vectors.py > tests/router/data/radix_tree_vectors.json

The streams are what engines send: ends are evicted before what they stand on, and some events repeat, refer to a parent
that is not there, or remove what is gone. Two things are left out, as the answers differ: holes, behind which the
reference forgets everything for good, and blocks that two workers call by different names, which it confuses. A step is
a call with what it raised, if anything; after each come questions with the scores of the answers.
"""

import json
import random
import sys
from importlib.metadata import version

from dynamo.llm import RadixTree

STREAMS = 16
STEPS = 40


def name_of(path: "tuple[int, ...]") -> int:
    return random.Random(repr(path)).getrandbits(64)


class Stream:
    """One random stream, kept true to what each rank holds."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.tree = RadixTree()
        self.held: dict[tuple[int, int], set[tuple[int, ...]]] = {
            (worker, rank): set() for worker in (1, 2, 2**63 + 5) for rank in (0, 1)
        }
        self.steps: list = []
        self.number = 0

    def path(self) -> "tuple[int, ...]":
        return tuple(self.draw.choice((3, 5, 2**64 - 1)) for _ in range(self.draw.randint(1, 7)))

    def event(self, key: "tuple[int, int]", data: object) -> None:
        worker, rank = key
        event = {"event_id": self.number, "data": data, "dp_rank": rank}
        self.number += 1
        try:
            self.tree.apply_event(worker, json.dumps(event).encode())
            raised = None
        except (RuntimeError, ValueError) as e:
            raised = f"{type(e).__name__}: {e}"
        self.steps.append(["event", worker, event, raised])

    def store(self, key: "tuple[int, int]") -> None:
        path = self.path()
        start = self.draw.randrange(len(path))
        parent = path[:start]
        if parent and parent not in self.held[key] and self.draw.random() < 0.9:
            start, parent = 0, ()
        blocks = [{"block_hash": name_of(path[: i + 1]), "tokens_hash": path[i]} for i in range(start, len(path))]
        parent_hash = name_of(parent) if parent else None
        self.event(key, {"stored": {"parent_hash": parent_hash, "blocks": blocks}})
        if not parent or parent in self.held[key]:
            self.held[key].update(path[: i + 1] for i in range(start, len(path)))

    def remove(self, key: "tuple[int, int]") -> None:
        held = self.held[key]
        names = []
        for _ in range(self.draw.randint(1, 4)):
            ends = sorted(path for path in held if not any(other[:-1] == path for other in held))
            if not ends:
                break
            end = self.draw.choice(ends)
            held.discard(end)
            names.append(name_of(end))
        if self.draw.random() < 0.1:
            names.insert(self.draw.randint(0, len(names)), 12345)
        if names:
            self.event(key, {"removed": {"block_hashes": names}})

    def forget(self, call: str, key: "tuple[int, int]") -> None:
        getattr(self.tree, call)(key[0])
        self.steps.append([call, key[0]])
        for other in self.held:
            if other[0] == key[0]:
                self.held[other].clear()

    def ask(self) -> None:
        path = self.path()
        scores = self.tree.find_matches(list(path)).scores
        self.steps.append(["ask", path, sorted([*key, score] for key, score in scores.items())])

    def run(self) -> list:
        for _ in range(STEPS):
            key = self.draw.choice(list(self.held))
            kind = self.draw.random()
            if kind < 0.55:
                self.store(key)
            elif kind < 0.93:
                self.remove(key)
            elif kind < 0.96:
                self.event(key, "cleared")
                self.held[key].clear()
            else:
                self.forget(self.draw.choice(["remove_worker", "clear_all_blocks"]), key)
            for _ in range(2):
                self.ask()
        return self.steps


def main() -> None:
    streams = (json.dumps(Stream(seed).run(), separators=(",", ":")) for seed in range(STREAMS))
    made_by = f"ai-dynamo {version('ai-dynamo')}, see make_radix_tree_vectors.py"
    lines = ",\n".join(streams)
    sys.stdout.write(f'{{"made_by":{json.dumps(made_by)},"streams":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
