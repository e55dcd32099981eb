"""A scheduler small enough that tests reach its limits, and the requests to do it with."""

import asyncio
from collections.abc import Callable

from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest, SamplingOptions, StopConditions
from dynamo.mocker.sampler import Reasoning, Sampler
from dynamo.mocker.scheduler import Scheduler, SchedulerConfig
from dynamo.mocker.timing import StepTiming

VOCABULARY = range(100, 1100)
EOS = 2


async def eventually(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    """Return once `condition()` holds, for what tells nobody that it changed."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def small_scheduler(
    timing: StepTiming | None = None, reasoning: Reasoning | None = None, **limits: object
) -> Scheduler:
    """32 blocks of 4 tokens, unless `limits` (fields of SchedulerConfig) say otherwise."""
    config = SchedulerConfig(
        **{"num_blocks": 32, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32} | limits  # type: ignore[arg-type]
    )
    return Scheduler(config, timing or StepTiming(speedup_ratio=0), Sampler(VOCABULARY, reasoning))


def request(
    prompt: range | list[int], max_tokens: int | None = 8, seed: int | None = None, **stop: object
) -> PreprocessedRequest:
    """A request for `max_tokens` tokens after `prompt`."""
    return PreprocessedRequest(
        model="m",
        token_ids=list(prompt),
        stop_conditions=StopConditions(max_tokens=max_tokens, **stop),  # type: ignore[arg-type]
        sampling_options=SamplingOptions(seed=seed),
        eos_token_ids=[EOS],
    )


def run(scheduler: Scheduler, max_steps: int = 10_000) -> dict[str, list[EngineOutput]]:
    """Step until nothing is left. Every request's outputs, in order."""
    outputs: dict[str, list[EngineOutput]] = {}
    now = 0.0
    for _ in range(max_steps):
        step = scheduler.schedule(now)
        if step is None:
            return outputs
        now += step.duration_s
        for request_id, output in scheduler.complete(step, now):
            outputs.setdefault(request_id, []).append(output)
    raise AssertionError(f"{len(scheduler)} requests did not end in {max_steps} steps")


def tokens(outputs: list[EngineOutput]) -> list[int]:
    """All tokens of one request."""
    return [token for output in outputs for token in output.token_ids]
