"""Why does a seeded request with a long prompt not end vLLM's worker on a CPU?

vLLM computes a long prompt in chunks and draws a token after each, which it throws away for all chunks but the last.
It then winds a seeded request's random generator back by its offset, which only GPU generators have: on a CPU the
worker raises, and the engine is gone (seen with 0.32.0). This module, loaded into the worker by vLLM's option
`worker_extension_cls`, winds CPU generators back by their saved state instead. It replaces private methods, so it is
loaded only into versions that are known to have them and the fault (`dynamo.vllm.engine`).
"""

import os
from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from dynamo.vllm import spinning
from dynamo.vllm.driver import SPIN_LESS_ENV
from dynamo.vllm.kv_worker import KvKeeping


class SeedRepair(KvKeeping):
    """What `worker_extension_cls` names. vLLM adds it to its worker's bases, which have room for one such class only;
    for the seeds, loading the module is all it is for."""


def discarded_generators(runner: Any) -> dict[int, Any]:
    """The generators of those requests in the batch whose drawn token will be thrown away, by place in the batch."""
    batch = runner.input_batch
    discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
    return {int(i): batch.generators[int(i)] for i in discarded if int(i) in batch.generators}


class _Repaired(CPUModelRunner):  # type: ignore[misc]
    """The two methods as they should be; they replace those of the class itself, which vLLM names in its code."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in discarded_generators(self).values()]
        drawn = _sample(self, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return drawn

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = discarded_generators(self)
        for i in hidden:
            del generators[i]
        try:
            return _bookkeeping_sync(self, *args, **kwargs)
        finally:
            generators.update(hidden)


_sample = CPUModelRunner._sample
_bookkeeping_sync = CPUModelRunner._bookkeeping_sync
CPUModelRunner._sample = _Repaired._sample
CPUModelRunner._bookkeeping_sync = _Repaired._bookkeeping_sync

if os.environ.get(SPIN_LESS_ENV) == "1":
    spinning.spin_less()
