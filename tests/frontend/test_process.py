"""The program: starting, refusing, serving over TLS, leaving."""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dynamo.llm import ModelInput, ModelType, register_model
from dynamo.runtime import DistributedRuntime
from tests.frontend.front_door import CHAT, Answer, Wire, chat, fetch

READY_S = 30.0  # a loaded machine; the program itself takes under 2 s


class Program:
    """A frontend process on a free port."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, errors: Path) -> None:
        self.process = process
        self.port = port
        self.errors = errors

    async def exit_status(self) -> int:
        async with asyncio.timeout(15):
            return await self.process.wait()


Start = Callable[..., Awaitable[Program]]


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Start `python -m dynamo.frontend` with more arguments, and wait until it listens."""
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "kv"))
    programs: list[Program] = []

    async def run(*arguments: str, **env: str) -> Program:
        port = free_port()
        errors = tmp_path / f"stderr-{port}"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "dynamo.frontend",
            "--http-port",
            str(port),
            *arguments,
            stderr=errors.open("wb"),
            env={**os.environ, **env},
            start_new_session=True,
        )
        program = Program(process, port, errors)
        programs.append(program)
        async with asyncio.timeout(READY_S):
            while process.returncode is None:
                try:
                    (await Wire.open(port)).close()
                except OSError:
                    await asyncio.sleep(0.02)  # there is no event for a port of another process
                else:
                    return program
        raise AssertionError(errors.read_text())

    yield run
    for program in programs:
        if program.process.returncode is None:
            os.killpg(program.process.pid, signal.SIGKILL)
            await program.process.wait()


def refused(*arguments: str, **env: str) -> str:
    """Run the program with settings it refuses; gives back its one line."""
    run = subprocess.run(
        [sys.executable, "-m", "dynamo.frontend", *arguments],
        capture_output=True,
        text=True,
        timeout=READY_S,
        env={**os.environ, **env},
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def test_what_the_settings_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    assert "did you mean --http-port" in refused("--http-prot", "1")
    assert "--router-temperature must be at least 0" in refused("--router-temperature", "-1")
    assert "--use-remote-indexer: only False is in this version" in refused(DYN_USE_REMOTE_INDEXER="true")
    assert "sticky has no such weight" in refused("--router-policy", "sticky", "--router-prefill-load-scale", "2")
    assert "DYN_ROUTER_QUEUE_TIMEOUT_SECS" in refused(DYN_ROUTER_QUEUE_TIMEOUT_SECS="0")
    assert "dynamo run MODEL in=text" in refused("--interactive")
    assert "no file" in refused("--request-template", str(tmp_path / "absent.json"))
    assert "at least 1" in refused("--http-workers", "0")
    assert "DYN_HTTP_PORT" in refused(DYN_HTTP_PORT="many")
    assert "DYN_HTTP_BODY_LIMIT_MB" in refused(DYN_HTTP_BODY_LIMIT_MB="-1")
    assert "DYN_HTTP_SVC_CHAT_PATH" in refused(DYN_HTTP_SVC_CHAT_PATH="talk", DYN_DISCOVERY_BACKEND="mem")
    assert "DYN_METRICS_TTFT" in refused(DYN_METRICS_TTFT_MIN="-1", DYN_DISCOVERY_BACKEND="mem")
    assert "KUBECONFIG" in refused("--discovery-backend", "kubernetes")
    template = tmp_path / "t.json"
    template.write_text('{"temprature": 1}')
    assert "temprature" in refused("--request-template", str(template), DYN_DISCOVERY_BACKEND="mem")


def test_the_flag_wins_over_the_environment_and_settings_can_be_written_down(tmp_path: Path) -> None:
    from dynamo.frontend.args import parse

    os.environ["DYN_HTTP_PORT"] = "9001"
    try:
        assert parse([]).http_port == 9001
        config = parse(["--http-port", "9002", "--dump-config-to", str(tmp_path / "c.json")])
    finally:
        del os.environ["DYN_HTTP_PORT"]
    assert config.http_port == 9002
    assert json.loads((tmp_path / "c.json").read_text())["http_port"] == 9002
    assert config.http_host == "127.0.0.1"


def test_the_frontend_loads_no_engine() -> None:
    code = (
        "import sys, dynamo.frontend.service, dynamo.llm.preprocessor, dynamo.frontend.main; "
        "print([m for m in ('torch', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=READY_S, check=True)
    assert run.stdout.strip() == "[]"


async def test_it_answers_before_any_worker_and_leaves_on_sigterm(start: Start) -> None:
    program = await start()
    assert (await fetch(program.port, "/health")).json()["status"] == "healthy"
    assert (await fetch(program.port, "/v1/models")).json()["data"] == []
    program.process.terminate()
    assert await program.exit_status() == 0
    assert "listening on http://127.0.0.1:" in program.errors.read_text()


async def test_a_taken_address_is_one_line(start: Start) -> None:
    program = await start()
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dynamo.frontend", "--http-port", str(program.port), stderr=subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(run.communicate(), READY_S)
    assert run.returncode == 1
    assert b"cannot serve on 127.0.0.1" in errors


async def test_a_stream_is_finished_before_it_leaves_and_a_second_signal_does_not_wait(
    start: Start, model_dir: Path
) -> None:
    worker = DistributedRuntime(discovery_backend="file")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def generate(request, context):
        yield {"token_ids": [100]}
        begun.set()
        await go_on.wait()
        yield {"token_ids": [101], "finish_reason": "stop"}

    endpoint = worker.endpoint("dynamo.backend.generate")
    await endpoint.start_endpoint(generate)
    await register_model(ModelInput.Tokens, ModelType.Chat, endpoint, model_dir, "tiny")
    for patient in (True, False):
        begun.clear()
        go_on.clear()
        program = await start(DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS="30")
        await until(program.port, "/v1/models", lambda answer: answer.json()["data"])
        wire = await Wire.open(program.port)
        wire.post(CHAT, chat(stream=True))
        await wire.head()
        async with asyncio.timeout(10):
            await begun.wait()
        program.process.terminate()
        await until(program.port, "/health", lambda answer: answer.status == 503)
        if patient:
            go_on.set()
            assert (await wire.read_rest()).endswith(b"[DONE]\n\n")
            assert await program.exit_status() == 0
        else:
            started = time.monotonic()
            program.process.terminate()
            assert await program.exit_status() == 128 + signal.SIGTERM
            assert time.monotonic() - started < 5
        wire.close()
    await worker.close()


async def until(port: int, path: str, true: Callable[[Answer], object]) -> None:
    """Ask another process until it answers so; there is no event to wait for."""
    async with asyncio.timeout(READY_S):
        while not true(await fetch(port, path)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """ca.pem, server.pem/key and client.pem/key, the latter two signed by the first."""
    extension = tmp_path / "san"
    extension.write_text("subjectAltName=IP:127.0.0.1")
    run = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca"]
    subprocess.run([*run, "-keyout", tmp_path / "ca.key", "-out", tmp_path / "ca.pem"], check=True, capture_output=True)
    for name in ("server", "client"):
        request = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
        files = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.csr"]
        subprocess.run([*request, *files], check=True, capture_output=True)
        sign = ["openssl", "x509", "-req", "-days", "2", "-CAcreateserial", "-extfile", extension]
        files = ["-in", tmp_path / f"{name}.csr", "-CA", tmp_path / "ca.pem", "-CAkey", tmp_path / "ca.key"]
        subprocess.run([*sign, *files, "-out", tmp_path / f"{name}.pem"], check=True, capture_output=True)
    return tmp_path


async def over_tls(port: int, context: ssl.SSLContext) -> Answer:
    wire = await Wire.open(port, ssl=context)
    wire.get("/live")
    try:
        return await wire.read()
    finally:
        wire.close()


@needs_openssl
async def test_tls_and_client_certificates(start: Start, certificates: Path) -> None:
    flags = ["--tls-cert-path", str(certificates / "server.pem"), "--tls-key-path", str(certificates / "server.key")]
    program = await start(*flags)
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    assert (await over_tls(program.port, context)).status == 200
    strict = await start(*flags, "--tls-client-ca-cert-path", str(certificates / "ca.pem"))
    with pytest.raises((ssl.SSLError, OSError, EOFError)):
        await over_tls(strict.port, context)
    context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    assert (await over_tls(strict.port, context)).status == 200


@needs_openssl
async def test_a_renewed_certificate_is_shown_without_a_restart(start: Start, certificates: Path) -> None:
    flags = ["--tls-cert-path", str(certificates / "server.pem"), "--tls-key-path", str(certificates / "server.key")]
    program = await start(*flags)
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    context.check_hostname = False

    async def shown() -> str:
        wire = await Wire.open(program.port, ssl=context)
        wire.get("/live")
        assert (await wire.read()).status == 200
        found = dict(part[0] for part in wire.writer.get_extra_info("peercert")["subject"])
        wire.close()
        return str(found["commonName"])

    assert await shown() == "server"
    certificate = (certificates / "server.pem").read_text()
    (certificates / "server.pem").write_text("half of a")
    assert await shown() == "server"
    (certificates / "server.pem").write_text(certificate)
    for kind in ("pem", "key"):
        (certificates / f"client.{kind}").rename(certificates / f"server.{kind}")
    assert await shown() == "client"


@needs_openssl
def test_a_certificate_needs_its_key(certificates: Path) -> None:
    assert "belong together" in refused("--tls-cert-path", str(certificates / "server.pem"))
