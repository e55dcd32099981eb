"""What does a simulated token cost? The scheduler alone, without sockets: `python benchmarks/mocker.py`.

A worker must not be the bottleneck of a frontend's benchmark: the aim is 5 us a token, encoding included.
"""

import argparse
import random
import time

import msgspec

from dynamo.llm.protocols.engine import PreprocessedRequest, StopConditions
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import Scheduler, SchedulerConfig
from dynamo.mocker.timing import StepTiming


def measure(streams: int, prompt: int, output: int, requests: int, block_size: int) -> tuple[float, int]:
    """CPU seconds and tokens of `requests` requests, `streams` at a time."""
    rnd = random.Random(0)
    scheduler = Scheduler(
        SchedulerConfig(block_size=block_size), StepTiming(speedup_ratio=0), Sampler(range(100, 32000))
    )
    encoder = msgspec.msgpack.Encoder()
    waiting = [
        PreprocessedRequest(
            model="m",
            token_ids=[rnd.randrange(100, 32000) for _ in range(prompt)],
            stop_conditions=StopConditions(max_tokens=output, ignore_eos=True),
            eos_token_ids=[2],
        )
        for _ in range(requests)
    ]
    submitted, tokens = 0, 0
    start = time.process_time()
    while len(scheduler) or submitted < requests:
        while submitted < requests and len(scheduler) < streams:
            scheduler.add(str(submitted), waiting[submitted], 0.0)
            submitted += 1
        step = scheduler.schedule(0.0)
        assert step is not None
        outputs = scheduler.complete(step, 0.0)
        encoder.encode(outputs)
        encoder.encode(scheduler.take_kv_events())
        tokens += len(outputs)
    return time.process_time() - start, tokens


def main() -> None:
    """Print one line a load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=512)
    args = parser.parse_args()
    print(f"{'streams':>8} {'prompt':>7} {'output':>7} {'us/token':>9} {'tokens/s':>10}")
    for streams, prompt, output in ((8, 200, 200), (32, 200, 200), (64, 200, 200), (256, 200, 200), (16, 6000, 4)):
        seconds, tokens = measure(streams, prompt, output, args.requests, args.block_size)
        print(f"{streams:8} {prompt:7} {output:7} {seconds / tokens * 1e6:9.2f} {tokens / seconds:10.0f}")


if __name__ == "__main__":
    main()
