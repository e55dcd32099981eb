"""How long do vLLM's processes spin for one another, where every core is needed for work?

vLLM's engine core and its worker talk through shared memory. Who waits there looks again and again for a second before
it sleeps: on a GPU's host that saves microseconds a step, on a CPU it takes the cores that compute. A worker that keeps
KV for others, or waits for some, steps a thousand times a second and so never sleeps at all: two such engines on two
cores were seen to stop each other for seconds. Here the wait spins for a moment, then naps until it is woken.
"""

import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SPIN_S = 0.0002  # a wake-up takes 50 to 100 µs; spinning for more than a few of those saves nothing
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
