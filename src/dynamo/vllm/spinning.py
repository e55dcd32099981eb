"""How long do vLLM's processes wait for one another, where every core is needed for work?

vLLM's engine core and its worker talk through shared memory. Who waits there looks again and again for a second before
it sleeps: on a GPU's host that saves microseconds a step, on a CPU it takes the cores that compute. A worker that keeps
KV for others, or waits for some, steps a thousand times a second and so never sleeps at all: two such engines on two
cores were seen to stop each other for seconds. Here the wait spins for a moment, then naps until it is woken.

An engine with nothing to compute that waits for KV, or keeps some, sleeps a millisecond between two looks, also when a
request has come, or its KV. Here it hears of requests at once, goes on at once with what has arrived, and looks five
times less often where it only keeps KV: such looks took half a core.
"""

import queue
import time
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SPIN_S = 0.0002  # a wake-up takes 50 to 100 µs; spinning for more than a few of those saves nothing
LOOK_S = 0.001  # between two looks for KV that somebody waits for; vLLM's own
KEPT_S = 0.005  # between two looks for readers of what is kept: so much later its blocks are free again
NAP_MS = 1  # a wake-up that follows another within a millisecond may be lost: ZeroMQ drops it (its queue holds one)


def spin_less() -> None:
    """Change this process's waits. After a second without a message they are vLLM's own again, which sleep."""
    SpinCondition.wait = _wait


def _wait(self: SpinCondition, timeout_ms: int | None = None) -> None:
    now = time.monotonic()
    since = getattr(self, "_dynamo_waiting_since", 0.0)
    if since < self.last_read:
        self._dynamo_waiting_since = since = now
    if now > self.last_read + self.busy_loop_s or now <= since + SPIN_S:
        _vllm_wait(self, timeout_ms)
        return
    if self.local_notify_socket in dict(self.poller.poll(NAP_MS)):
        self.local_notify_socket.recv(copy=False)


_vllm_wait = SpinCondition.wait


def wait_for_requests(core: Any) -> None:
    """Change how a class of engine core waits between two steps: vLLM's `EngineCoreProc`."""
    core._process_engine_step = _process_engine_step


def _process_engine_step(self: Any) -> bool:
    outputs, executed = self.step_fn()
    for output in outputs.items() if outputs else ():
        self.output_queue.put_nowait(output)
    self.post_step(executed)
    scheduler = self.scheduler
    if not executed and scheduler.has_requests() and not scheduler.finished_recving_kv_req_ids:
        await_item(self.input_queue, LOOK_S if scheduler.has_unfinished_requests() else KEPT_S)
    return bool(executed)


def await_item(waiting: "queue.Queue[Any]", limit_s: float) -> None:
    """Until there is something in a queue that nobody else reads, or time is up. It stays there."""
    with waiting.not_empty:
        if not waiting.queue:
            waiting.not_empty.wait(limit_s)
