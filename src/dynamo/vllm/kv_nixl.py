"""How does KV pass between vLLM workers by NIXL, without a spinning thread and without a read that comes too late?

vLLM's own pull connector (`NixlConnector`), changed in eight places; loaded into vLLM's processes by
`kv_connector_module_path`. Written against the versions of `dynamo.vllm.engine_core`:

- NIXL's progress thread is off: it costs a core for each idle worker. A thread of ours polls every millisecond while
  KV is kept, and else sleeps: the end of a read needs its target to listen, which would be after its next prompt.
- The side channel takes a port that is free when it binds, so that workers of one machine need no numbers.
- The prefill side says until when the KV stays. The decode side does not begin a read after its deadline, and throws
  away one that ended after it: the blocks may be another prompt's by then. vLLM recomputes, as for any failed load.
- KV that nobody will fetch can be given back before its lease ends.
- Leases can be renewed by others than the engine that will read, as that engine may not have the request yet. vLLM's
  own renewals, which such an engine sends once it has, give a whole lease and not two thirds of one. Either way the
  reader goes by what it was told.
- A prompt may be longer than what was computed of it: by the first token, see `dynamo.vllm.following`.
- A read that takes a moment is waited for, where vLLM would look again a step later.
- A worker computes on any core. vLLM moves it to the machine's last one, together with all others of the machine, whose
  answers then stood still while a prompt was computed.
"""

import logging
import os
import socket
import threading
import time
from collections import deque
from typing import Any

import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import (
    NixlPullConnector,
    NixlPullConnectorScheduler,
    NixlPullConnectorWorker,
    base_worker,
    connector,
)
from vllm.logger import init_logger

logger = init_logger("vllm.dynamo.kv_nixl")

PORT_ENV = "VLLM_NIXL_SIDE_CHANNEL_PORT"
LISTEN_S = 0.001  # between two looks for readers; two per cent of a core while KV is kept
AWAIT_S = 0.005  # for a read while the engine has nothing to compute: as long as a step, with its hand-over
AWAIT_BUSY_S = 0.0003  # while it has: the read itself is done by then, here, and only its end is missing
_PAUSE_S = 0.00002  # between two looks; without it UCX's own thread gets to nothing, and a read of 1 ms takes 2
_BIND_TRIES = 20  # each time another port was taken between asking for a free one and binding it

_agent_config = base_worker.nixl_agent_config


def _without_progress_thread(**settings: Any) -> Any:
    from nixl._api import nixl_thread_sync_t  # type: ignore[import-untyped]

    sync_mode = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT  # for the thread of ours
    return _agent_config(enable_prog_thread=False, **(settings | {"num_threads": 0, "sync_mode": sync_mode}))


base_worker.nixl_agent_config = _without_progress_thread

# vLLM wants workers to be one or the other. Ours change, and nobody need be warned of that at each start.
logging.getLogger(connector.__name__).addFilter(lambda record: "kv_role='kv_both'" not in record.getMessage())


class _Scheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._port_is_ours = PORT_ENV not in os.environ
        if self._port_is_ours:
            self.side_channel_port = _free_port(self.side_channel_host)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count, later = super().get_num_new_matched_tokens(request, num_computed_tokens)
        params = request.kv_transfer_params or {}
        if later and (kept := params.get("remote_num_tokens")):
            count = min(count, kept - num_computed_tokens)
        return (count, later) if count > 0 else (0, False)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        delayed, params = super().request_finished(request, block_ids)
        if params is not None and request.request_id in self._reqs_need_send:
            # perf_counter is CLOCK_MONOTONIC here, which the worker's front process reads too
            params["remote_blocks_expiry_time"] = self._reqs_need_send[request.request_id]
        return delayed, params

    def _nixl_handshake_listener(
        self, encoded_data: Any, ready: threading.Event, stop: threading.Event, host: str, port: int
    ) -> None:
        for _ in range(_BIND_TRIES):
            try:
                NixlPullConnectorScheduler._nixl_handshake_listener(encoded_data, ready, stop, host, port)
            except zmq.ZMQError as error:
                if ready.is_set() or error.errno != zmq.EADDRINUSE or not self._port_is_ours:
                    ready.set()  # or the engine would wait for it for ever
                    logger.error("NIXL's side channel at %s:%d does not work: %s", host, port, error)  # noqa: TRY400
                    return
                self.side_channel_port = port = _free_port(host)
            else:
                return
        ready.set()
        logger.error("NIXL's side channel found no free port on %s", host)


class _Listening:
    """A NIXL agent that hears its readers while the engine computes. While KV is kept its thread calls
    `get_new_notifs`; what the worker calls meanwhile, to read KV itself, NIXL keeps apart from that (`sync_mode`)."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._heard: deque[dict[str, list[bytes]]] = deque()
        self._wanted = threading.Event()
        self._stopped = False
        threading.Thread(target=self._listen, name="dynamo-kv-listener", daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def listen(self, wanted: bool) -> None:
        """Whether anybody may be reading."""
        if wanted:
            self._wanted.set()
        else:
            self._wanted.clear()

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped = True
        self._wanted.set()

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        """What was heard since the last call."""
        found: dict[str, list[bytes]] = {}
        while self._heard:
            for agent, messages in self._heard.popleft().items():
                found.setdefault(agent, []).extend(messages)
        if not self._wanted.is_set():  # what was begun gets on by it
            for agent, messages in self._agent.get_new_notifs().items():
                found.setdefault(agent, []).extend(messages)
        return found

    def _listen(self) -> None:
        while True:
            self._wanted.wait()
            if self._stopped:
                return
            if heard := self._agent.get_new_notifs():
                self._heard.append(heard)
            time.sleep(LISTEN_S)


class _Worker(NixlPullConnectorWorker):  # type: ignore[misc]
    def __init__(self, *args: Any) -> None:
        cores = os.sched_getaffinity(0)
        super().__init__(*args)
        os.sched_setaffinity(0, cores)
        self._given_back: set[str] = set()
        self._read_until: dict[tuple[str, str], float] = {}  # (their engine, its request) → monotonic time
        self._lease_extension: int = self.kv_transfer_config.get_from_extra_config("kv_lease_duration", 30)
        self._listening = _Listening(self.nixl_wrapper)
        self.nixl_wrapper: Any = self._listening

    def start_load_kv(self, metadata: Any) -> None:
        super().start_load_kv(metadata)
        self._listening.listen(bool(self._reqs_to_process))

    def await_reads(self, limit_s: float) -> None:
        """Let the reads that were begun get on, until they are done or time is up."""
        began = time.monotonic()
        while self._is_reading() and time.monotonic() - began < limit_s:
            time.sleep(_PAUSE_S)

    def _is_reading(self) -> bool:
        handles = [handle for each in self._recving_transfers.values() for handle in each]
        try:
            return any(self.nixl_wrapper.check_xfer_state(handle) == "PROC" for handle in handles)
        except Exception:  # noqa: BLE001 - NIXL's own kinds; who looks for results meets it again
            return False

    def shutdown(self) -> None:
        self._listening.stop()
        super().shutdown()

    def give_back(self, request_ids: list[str]) -> None:
        """Free the blocks of these requests, unless they were read or have expired already."""
        for request_id in request_ids:
            if request_id in self._reqs_to_process:
                self._reqs_to_process.remove(request_id)
                self._reqs_to_send.pop(request_id, None)
                self._given_back.add(request_id)

    def renew(self, request_ids: list[str]) -> list[float]:
        """See `KvKeeping.dynamo_renew_kv`."""
        return [self._renew(request_id, time.perf_counter()) for request_id in request_ids]

    def _renew(self, request_id: str, now: float) -> float:
        until: float | None = self._reqs_to_send.get(request_id)
        if until is None:  # it may have ended in the step that is not over yet: its lease has not begun
            return 0.0 if request_id in self._reqs_to_process else -1.0
        until = max(until, now + self._lease_extension)
        self._reqs_to_send[request_id] = until
        return until - now

    def extend_reads(self, deadlines: list[tuple[str, str, float]]) -> None:
        """See `KvKeeping.dynamo_extend_reads`."""
        now = time.monotonic()
        self._read_until = {key: until for key, until in self._read_until.items() if until > now}
        self._read_until |= {(engine, request): until for engine, request, until in deadlines}

    def _is_late(self, meta: Any) -> bool:
        remote = meta.remote
        deadline: float | None = remote.blocks_expiry_time
        if deadline is None:
            return False
        return time.monotonic() >= max(deadline, self._read_until.get((remote.engine_id, remote.request_id), 0.0))

    def _get_new_notifs(self) -> set[str]:
        read: set[str] = super()._get_new_notifs()
        given_back, self._given_back = self._given_back, set()
        return read | given_back

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        if self._is_late(meta) and (meta.awaiting_kvs or any(meta.local_block_ids)):
            logger.warning("not reading the KV of request %s: its lease is over", req_id)
            self._handle_failed_transfer(req_id, None, self._recv_failures)
            return
        super()._read_blocks_for_req(req_id, meta)

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done, failed = super()._pop_done_transfers(transfers)
        for req_id in done - failed:
            meta = self._recving_metadata.get(req_id)
            if meta is not None and any(meta.local_block_ids) and self._is_late(meta):
                logger.warning("throwing away the KV of request %s: it was read after its lease", req_id)
                self._handle_failed_transfer(req_id, None, failed)
        return done, failed


class HeldNixlConnector(NixlPullConnector):  # type: ignore[misc]
    """vLLM's pull connector with the changes above."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        here = (vllm_config, self.engine_id, kv_cache_config)
        self.connector_scheduler = _Scheduler(*here) if role == KVConnectorRole.SCHEDULER else None
        self.connector_worker = _Worker(*here) if role == KVConnectorRole.WORKER else None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        if self.connector_worker is not None:
            idle = forward_context.attn_metadata is None
            self.connector_worker.await_reads(AWAIT_S if idle else AWAIT_BUSY_S)

    def give_back(self, request_ids: list[str]) -> None:
        """See `_Worker.give_back`."""
        if self.connector_worker is not None:
            self.connector_worker.give_back(request_ids)

    def renew(self, request_ids: list[str]) -> list[float] | None:
        """See `KvKeeping.dynamo_renew_kv`."""
        return self.connector_worker.renew(request_ids) if self.connector_worker is not None else None

    def extend_reads(self, deadlines: list[tuple[str, str, float]]) -> None:
        """See `KvKeeping.dynamo_extend_reads`."""
        if self.connector_worker is not None:
            self.connector_worker.extend_reads(deadlines)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
        return port
