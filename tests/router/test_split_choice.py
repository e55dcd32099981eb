"""Does a split policy see both pools as they are?"""

import pytest

from dynamo.router.config import KvRouterConfig
from dynamo.router.queue import RouterQueue
from dynamo.router.queue_profile import load_profile
from dynamo.router.scheduler import KvScheduler
from dynamo.router.split import Always
from dynamo.router.split_choice import SplitChoice
from dynamo.router.types import Overlap, Prefilled, RouteRequest, WorkerKey, WorkerLimits

BLOCK = 16


class Holds:
    """Everyone who holds anything holds so many blocks of every prompt."""

    def __init__(self, blocks: dict[int, int]) -> None:
        self.blocks = blocks

    def find(self, sequence_hashes, now) -> dict[WorkerKey, Overlap]:
        return {WorkerKey(worker): Overlap(device=blocks) for worker, blocks in self.blocks.items()}


def pool(workers: int, holds: dict[int, int] | None = None, **settings) -> RouterQueue:
    config = KvRouterConfig(**settings)
    scheduler = KvScheduler(BLOCK, config, Holds(holds or {}))
    for worker in range(workers):
        scheduler.add_worker(WorkerKey(worker), WorkerLimits(1000, 8192, 256))
    return RouterQueue(scheduler, load_profile(config))


def prompt(name: str = "new", tokens: int = 1600) -> RouteRequest:
    return RouteRequest(request_id=name, token_count=tokens, sequence_hashes=list(range(tokens // BLOCK)))


def send(queue: RouterQueue, request: RouteRequest) -> None:
    queue.route(request, 0.0, lambda decision: None, lambda error: pytest.fail(str(error)))


def choice(prefill: RouterQueue, decode: RouterQueue) -> SplitChoice:
    return SplitChoice(Always(KvRouterConfig()), prefill, decode, lambda tokens: tokens / 1e5)


def test_the_effective_length_is_that_of_the_worker_that_would_answer():
    view = choice(pool(2, {1: 10}), pool(3, {2: 90})).view(prompt(), 0.0)
    assert (view.prompt_tokens, view.prefill_new_tokens, view.decode_new_tokens) == (1600, 1440, 160)
    assert view.transfer_s == pytest.approx(0.016)


def test_what_waits_at_the_router_is_queued_for_the_prefill_workers_too():
    prefill = pool(2, router_queue_threshold=0.5)
    for number in range(6):  # two go at once and fill both workers, the others wait
        send(prefill, prompt(str(number), 8000))
    assert prefill.pending == 4
    view = choice(prefill, pool(1)).view(prompt(), 0.0)
    assert view.prefill_queued_tokens == 8000 + 4 * 8000 // 2
    assert view.prefill_load == pytest.approx(3 * 8000 / 8192)


def test_requests_past_their_first_token_are_those_that_a_prompt_would_hold_up():
    decode = pool(1)
    for name in ("one", "two", "three"):
        send(decode, prompt(name, 320))
    decode.scheduler.prefill_done("one", 0.5)
    decode.scheduler.prefill_done("two", 0.5)
    view = choice(pool(1), decode).view(prompt(), 0.5)
    assert view.decoding == 2
    assert 0 < view.decode_queued_tokens <= 320
    assert view.decode_load == pytest.approx(decode.scheduler.load.decode_blocks[0] / 1000)


def test_looking_changes_nothing_in_either_pool():
    prefill, decode = pool(2), pool(2)
    choice(prefill, decode).decide(prompt(), 0.0)
    for queue in (prefill, decode):
        assert not queue.scheduler.load.bookings
        assert queue.scheduler.load.prefill_tokens == [0, 0]


def test_prompt_times_are_learnt_from_decode_workers_while_nothing_travels():
    prefill, decode = pool(1, router_policy="marginal"), pool(1, router_policy="marginal")

    def seconds() -> float:
        view = choice(prefill, decode).view(prompt(), 0.0)
        return view.step_s + view.decode_new_tokens * view.token_s

    def teach(queue: RouterQueue, token_s: float) -> None:
        for number in range(100):
            tokens = 1000 + 100 * (number % 10)
            queue.scheduler.policy.prefilled(Prefilled(WorkerKey(0), tokens, 0, 0, 0, tokens * token_s))

    guessed = seconds()
    teach(decode, 1e-3)
    assert seconds() > 5 * guessed
    teach(prefill, 2e-5)
    assert seconds() < guessed
