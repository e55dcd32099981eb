"""An engine's cache, simulated, and told over ZeroMQ in the form in which vLLM and SGLang tell it."""

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.kv_events import KvEventData
from dynamo.llm.protocols.engine import PreprocessedRequest, StopConditions
from dynamo.mocker.batching import SchedulerConfig
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import Scheduler
from dynamo.mocker.timing import StepTiming

BLOCK = 4


class Engine:
    """One rank. `run` computes a prompt and tells what that changed; `say` tells anything at all."""

    def __init__(self, blocks: int = 64, *, block_size: int = BLOCK, kept: int = 10_000, replay: bool = True) -> None:
        limits = SchedulerConfig(
            num_blocks=blocks, block_size=block_size, max_num_seqs=4, max_model_len=blocks * block_size
        )
        self.block_size = block_size
        self.scheduler = Scheduler(limits, StepTiming(0), Sampler(range(1000, 2000)))
        self.sequence = 0
        self._kept = kept
        self._batches: list[tuple[int, bytes]] = []
        self._contents: dict[int, list[int]] = {}
        self._numbers = itertools.count()
        self._context = zmq.Context()
        self._out = self._context.socket(zmq.PUB)
        self.endpoint = f"tcp://127.0.0.1:{self._out.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay_endpoint: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if replay:
            socket = self._context.socket(zmq.ROUTER)
            self.replay_endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
            self._thread = threading.Thread(target=self._replay, args=(socket,))
            self._thread.start()

    @property
    def pool(self) -> Any:
        return self.scheduler.pool

    def registration(self, instance_id: int, **more: Any) -> dict[str, Any]:
        """What `/register` takes."""
        body = {"instance_id": instance_id, "endpoint": self.endpoint, "model_name": "m", "block_size": self.block_size}
        if self.replay_endpoint is not None:
            body["replay_endpoint"] = self.replay_endpoint
        return body | more

    def run(self, prompt: Sequence[int]) -> None:
        """Compute a prompt and one token."""
        self._contents |= {
            content: list(prompt[i * self.block_size : (i + 1) * self.block_size])
            for i, content in enumerate(compute_block_hash_for_seq(prompt, self.block_size))
        }
        asked = PreprocessedRequest("m", list(prompt), StopConditions(max_tokens=1, ignore_eos=True))
        self.scheduler.add(str(next(self._numbers)), asked, 0.0)
        while (step := self.scheduler.schedule(0.0)) is not None:
            self.scheduler.complete(step, 0.0)
        events = self.scheduler.take_kv_events()
        if events:
            self.say(*map(self._told, events))

    def _told(self, change: KvEventData) -> dict[str, Any]:
        if change.removed is not None:
            return {"type": "BlockRemoved", "block_hashes": change.removed.block_hashes, "medium": "GPU"}
        assert change.stored is not None
        tokens = [token for block in change.stored.blocks for token in self._contents[block.tokens_hash]]
        return stored(
            [b.block_hash for b in change.stored.blocks], tokens, change.stored.parent_hash, size=self.block_size
        )

    def say(self, *events: Any, lost: bool = False) -> None:
        """Publish a batch of events, or lose it on the way."""
        payload = msgspec.msgpack.encode([1.0, list(events), 0])
        number, self.sequence = self.sequence, self.sequence + 1
        self._batches = [*self._batches, (number, payload)][-self._kept :]
        if not lost:
            self._out.send_multipart([b"kv-events", number.to_bytes(8, "big"), payload])

    def holds(self, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that are in the cache."""
        names = sequence_hashes(compute_block_hash_for_seq(prompt, self.block_size))
        length: int = self.pool.match(names, len(names))
        return length * self.block_size

    def _replay(self, socket: "zmq.Socket[bytes]") -> None:
        while not self._stop.is_set():
            if not socket.poll(50):
                continue
            identity, _, start = socket.recv_multipart()
            for number, payload in self._batches:
                if number >= int.from_bytes(start, "big"):
                    socket.send_multipart([identity, b"", number.to_bytes(8, "big"), payload])
            socket.send_multipart([identity, b"", (2**64 - 1).to_bytes(8, "big"), b""])
        socket.close(0)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        self._out.close(0)
        self._context.term()


def stored(
    hashes: list[int], tokens: list[int], parent: int | None = None, *, size: int = BLOCK, medium: str = "GPU"
) -> dict[str, Any]:
    """An event of blocks that came."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": size,
        "lora_id": None,
        "medium": medium,
    }
