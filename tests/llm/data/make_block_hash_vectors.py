"""Where do the numbers in `block_hash_vectors.json` come from?

From the reference implementation, `ai-dynamo` 1.6.1 of PyPI, asked through its public
`dynamo.llm.compute_block_hash_for_seq`. To make the file anew, install that version into an environment of its own
(it has the same import name as this project) and run

    REFERENCE/bin/python tests/llm/data/make_block_hash_vectors.py > tests/llm/data/block_hash_vectors.json
"""

import json
import random
import sys
from importlib.metadata import version

from dynamo.llm import compute_block_hash_for_seq

U64 = 2**64 - 1


def tokens_of(draw: random.Random, count: int, limit: int) -> list[int]:
    return [draw.randrange(limit) for _ in range(count)]


def mm_info(draw: random.Random) -> "dict | None":
    if draw.random() < 0.3:
        return None
    hashes = [draw.randrange(U64) for _ in range(draw.randrange(4))]
    return {"mm_objects": [{"mm_hash": value, "offsets": [[0, 2]]} for value in hashes]}


def cases(draw: random.Random) -> "list[dict]":
    made = []
    for block_size in (1, 2, 4, 16, 64, 128):
        for count in (0, 1, block_size - 1, block_size, block_size + 1, 2 * block_size, 5 * block_size + 3):
            made.append({"tokens": tokens_of(draw, count, 150_000), "kv_block_size": block_size})
    made.append({"tokens": tokens_of(draw, 64 * 16 + 5, 2**32), "kv_block_size": 16})
    made.append({"tokens": [0, 2**32 - 1, 2**31, 1], "kv_block_size": 2})
    for lora in (None, "", "a", "my-adapter", "Ünïcode-адаптер", "x" * 300):
        for salt in (None, "", "a", "tenant-7", "盐"):
            for eagle in (None, False, True):
                made.append(
                    {
                        "tokens": tokens_of(draw, 19, 150_000),
                        "kv_block_size": 4,
                        "lora_name": lora,
                        "cache_namespace": salt,
                        "is_eagle": eagle,
                    }
                )
    for infos in range(8):
        for eagle in (None, True):
            made.append(
                {
                    "tokens": tokens_of(draw, 21, 150_000),
                    "kv_block_size": 4,
                    "block_mm_infos": [mm_info(draw) for _ in range(infos)],
                    "is_eagle": eagle,
                    "lora_name": draw.choice([None, "a"]),
                }
            )
    return made


if __name__ == "__main__":
    vectors = [{"arguments": case, "hashes": compute_block_hash_for_seq(**case)} for case in cases(random.Random(7))]
    lines = ",\n".join(json.dumps(vector, ensure_ascii=False, separators=(",", ":")) for vector in vectors)
    made_by = json.dumps(f"ai-dynamo {version('ai-dynamo')}, see make_block_hash_vectors.py")
    sys.stdout.write(f'{{"made_by":{made_by},"vectors":[\n{lines}\n]}}\n')
