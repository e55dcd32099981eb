"""How do tests start a real vLLM server, as its users do, and end it?"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

StartAttach = Callable[..., Awaitable["asyncio.Task[int]"]]
START_S = 240.0  # an engine imports torch and loads on two cores that others use too


@dataclass(eq=False)
class VllmServer:
    """A real vLLM OpenAI server, started as its users start it."""

    url: str
    kv_events: str
    kv_replay: str
    directory: Path
    process: "subprocess.Popen[bytes]"


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_vllm(directory: Path, log: Path, *flags: str) -> VllmServer:
    """Start a server; `wait_for_vllm` waits until it answers."""
    port, events, replay = free_ports(3)
    kv = (
        f'{{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:{events}", '
        f'"replay_endpoint": "tcp://127.0.0.1:{replay}", "topic": "kv@tiny"}}'
    )
    words = ["--model", str(directory), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-model-len", "2048", "--enforce-eager", "--dtype", "float32", "--block-size", "32"]
    words += ["--num-gpu-blocks-override", "512", "--kv-events-config", kv, *flags]
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM compiles parts of its sampler at their first use, for seconds each
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=out, stderr=out, env=environ, start_new_session=True,
        )  # fmt: skip
    endpoints = f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}"
    return VllmServer(f"http://127.0.0.1:{port}", *endpoints, directory, process)


def wait_for_vllm(server: VllmServer, log: Path) -> None:
    """Until it is healthy. Fails with its log."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(f"vLLM did not start:\n{log.read_text(errors='replace')[-6000:]}")


def stop_vllm(server: VllmServer) -> None:
    """End it with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, 15)
    try:
        server.process.wait(20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, 9)
        server.process.wait(10)
