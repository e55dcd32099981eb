"""The engine that answers with the prompt."""

import asyncio
import subprocess
import sys

import pytest

from dynamo.echo.engine import echo_engine
from dynamo.echo.main import parse_args
from dynamo.engine.contract import EngineConfig
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import InvalidArgument
from tests.engine.scripted import DEADLINE_S, collect, request, serving

CONFIG = EngineConfig(model="m", served_model_name="m", context_length=10)


async def test_it_says_the_prompt_and_stops(runtime, model_dir):
    async with serving(runtime, echo_engine(CONFIG, 0.0), model_dir) as (_, client):
        items = await collect(await client.generate(request([7, 8, 9]), annotated=False))
        assert [item["token_ids"] for item in items] == [[7], [8], [9]]
        assert items[-1]["finish_reason"] == "stop"
        assert items[-1]["completion_usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


@pytest.mark.parametrize(("prompt", "limit", "length"), [([7, 8, 9], 2, 2), ([1] * 7, None, 3)])
async def test_it_ends_at_max_tokens_or_the_context(runtime, model_dir, prompt, limit, length):
    async with serving(runtime, echo_engine(CONFIG, 0.0), model_dir) as (_, client):
        asked = request(prompt) | {"stop_conditions": {"max_tokens": limit}}
        items = await collect(await client.generate(asked, annotated=False))
        assert len(items) == length
        assert items[-1]["finish_reason"] == "length"


async def test_a_prompt_over_the_context_is_refused(runtime, model_dir):
    async with serving(runtime, echo_engine(CONFIG, 0.0), model_dir) as (_, client):
        with pytest.raises(InvalidArgument, match="context length is 10"):
            await collect(await client.generate(request([1] * 10)))


async def test_the_program_serves_its_workers(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    words = ["-m", "dynamo.echo", "--model-path", str(model_dir), "--model-name", "m", "--num-workers", "2"]
    process = await asyncio.create_subprocess_exec(sys.executable, *words, "--delay-ms", "1", stdout=subprocess.PIPE)
    runtime = DistributedRuntime()
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert (
                await process.stdout.readline() == b"echo is ready: m by 2 workers at dyn://dynamo.backend.generate\n"
            )
        client = await runtime.endpoint("dynamo.backend.generate").client()
        assert len(await client.wait_for_instances(DEADLINE_S)) == 2
        items = await collect(await client.generate(request([7, 8, 9]), annotated=False))
        assert [item["token_ids"] for item in items] == [[7], [8], [9]]
        process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await runtime.close()


def test_the_pace_is_the_flags_else_the_variables(monkeypatch):
    base = ["--model-path", "x"]
    assert parse_args(base).delay_ms == 10.0
    monkeypatch.setenv("DYN_TOKEN_ECHO_DELAY_MS", "2.5")
    assert parse_args(base).delay_ms == 2.5
    assert parse_args([*base, "--delay-ms", "0"]).delay_ms == 0.0


@pytest.mark.parametrize(("argv", "words"), [([], "--model-path: is required"), (["--model-pat", "x"], "--model-path")])
def test_a_wrong_word_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
