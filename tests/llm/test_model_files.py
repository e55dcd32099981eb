"""How do a model's files get from a worker to a frontend without a shared disk?"""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynamo.llm import ModelInput, ModelType, register_model
from dynamo.llm.model_card import CardFile, ModelDeploymentCard
from dynamo.llm.model_directory import CUSTOM_TEMPLATE, file_checksum
from dynamo.llm.model_files import (
    CHUNK_BYTES,
    FileRequest,
    IncomingFile,
    ModelCache,
    ModelFilesError,
    fetch_files,
    files_digest,
)
from dynamo.llm.preprocessor import Preprocessor
from dynamo.runtime import Client, DistributedRuntime
from dynamo.runtime.errors import InvalidArgument

CHAT = ModelType.Chat | ModelType.Completions


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


async def register(runtime: DistributedRuntime, directory: Path, **more: Any) -> ModelDeploymentCard:
    """Register, and give the card as a frontend on another machine sees it."""
    endpoint = runtime.endpoint("ns.backend.generate")
    card = await register_model(ModelInput.Tokens, CHAT, endpoint, directory, "m", **more)
    card = ModelDeploymentCard.from_json(card.to_json())
    card.source_path = "/not/on/this/machine"
    return card


def leftovers(cache: Path) -> list[Path]:
    """Files and directories that were begun and not put in their place."""
    return list(cache.rglob(".*"))


def contents(directory: Path, card: ModelDeploymentCard) -> dict[str, bytes]:
    return {file.name: (directory / file.name).read_bytes() for file in card.files}


async def test_a_frontend_without_the_directory_gets_the_same_files(
    runtime: DistributedRuntime, model_dir: Path, cache: Path
) -> None:
    card = await register(runtime, model_dir)
    fetched = await fetch_files(runtime, card, runtime.instance_id)
    assert fetched.is_relative_to(cache)
    assert contents(fetched, card) == contents(model_dir, card)
    Preprocessor(card, fetched)


async def test_files_of_several_chunks_arrive_whole(
    runtime: DistributedRuntime, model_dir: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(model_dir, tmp_path / "big"))
    (directory / "extra.tiktoken").write_bytes(os.urandom(2 * CHUNK_BYTES + 17))
    (directory / "empty.tiktoken").write_bytes(b"")
    card = await register(runtime, directory)
    fetched = await fetch_files(runtime, card)
    assert contents(fetched, card) == contents(directory, card)


async def test_a_custom_template_travels_too(runtime: DistributedRuntime, model_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.txt"
    template.write_text("custom {{ messages[0].content }}")
    card = await register(runtime, model_dir, custom_template_path=template)
    card.source_path = str(model_dir)
    fetched = await fetch_files(runtime, card)
    assert (fetched / CUSTOM_TEMPLATE).read_text() == template.read_text()


async def test_the_worker_s_own_directory_is_used_when_it_is_the_same(
    runtime: DistributedRuntime, model_dir: Path, tmp_path: Path
) -> None:
    card = await register(runtime, model_dir)
    card.source_path = str(model_dir)
    assert await fetch_files(runtime, card) == model_dir
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    (other / "special_tokens_map.json").write_text("{}")
    card.source_path = str(other)
    assert await fetch_files(runtime, card) != other


async def test_nothing_is_fetched_twice(runtime: DistributedRuntime, model_dir: Path) -> None:
    card = await register(runtime, model_dir)
    first = await fetch_files(runtime, card)
    card.endpoint = "nobody.serves.this"
    assert await fetch_files(runtime, card) == first


async def test_many_at_once_get_the_same_directory(runtime: DistributedRuntime, model_dir: Path, cache: Path) -> None:
    card = await register(runtime, model_dir)
    found = await asyncio.gather(*(fetch_files(runtime, card) for _ in range(8)))
    assert len(set(found)) == 1
    assert leftovers(cache) == []


async def test_a_damaged_cache_heals(runtime: DistributedRuntime, model_dir: Path) -> None:
    card = await register(runtime, model_dir)
    fetched = await fetch_files(runtime, card)
    (fetched / "config.json").write_text("damaged")  # the blob too: it is the same file
    assert contents(await fetch_files(runtime, card), card) == contents(model_dir, card)


async def test_a_file_that_changed_at_the_worker_is_not_accepted(
    runtime: DistributedRuntime, model_dir: Path, tmp_path: Path, cache: Path
) -> None:
    directory = Path(shutil.copytree(model_dir, tmp_path / "changing"))
    card = await register(runtime, directory)
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("a", "b"))
    with pytest.raises(ModelFilesError, match=r"config\.json came with another content"):
        await fetch_files(runtime, card)
    assert leftovers(cache) == []


async def test_a_worker_gives_only_files_of_its_cards(runtime: DistributedRuntime, model_dir: Path) -> None:
    await register(runtime, model_dir)
    client = await runtime.endpoint("ns.backend.model_files").client()
    await client.wait_for_instances(5)
    weights = model_dir / "config.json"
    asked: list[Any] = [
        FileRequest("../../etc/passwd", 0),
        FileRequest(str(weights), 0),
        FileRequest("blake3:" + "0" * 64, 0),
        FileRequest(file_checksum(weights), -1),
        {"checksum": 5},
        None,
    ]
    for request in asked:
        with pytest.raises(InvalidArgument):
            _ = [item async for item in await client.round_robin(request)]


async def test_without_a_worker_the_error_says_so(
    runtime: DistributedRuntime, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.llm.model_files.FIND_TIMEOUT_S", 0.05)
    card = await register(runtime, model_dir)
    card.endpoint = "other.backend.generate"
    with pytest.raises(ModelFilesError, match="no worker serves the files of model m"):
        await fetch_files(runtime, card)


async def all_seen(client: Client, count: int) -> None:
    """Wait until the client knows so many instances."""
    changed = asyncio.Event()
    client.on_change(changed.set)
    async with asyncio.timeout(5):
        while len(client.instance_ids()) < count:
            await changed.wait()
            changed.clear()


async def test_a_worker_that_sends_nonsense_is_left_for_another(runtime: DistributedRuntime, model_dir: Path) -> None:
    async def nonsense(request: Any) -> AsyncIterator[Any]:
        yield {"data": "text", "size": "?"}

    async def silence(request: Any) -> AsyncIterator[Any]:
        return
        yield

    card = await register(runtime, model_dir)
    liars = [DistributedRuntime(discovery_backend="mem") for _ in range(2)]
    try:
        for liar, handler in zip(liars, (nonsense, silence), strict=True):
            await liar.endpoint("ns.backend.model_files").start_endpoint(handler)
        client = await runtime.endpoint("ns.backend.model_files").client()
        await all_seen(client, 3)
        assert contents(await fetch_files(runtime, card, liars[0].instance_id), card) == contents(model_dir, card)
    finally:
        await asyncio.gather(*(liar.close() for liar in liars))


async def test_a_full_disk_is_a_clear_error(
    runtime: DistributedRuntime, model_dir: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def full(self: IncomingFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    card = await register(runtime, model_dir)
    monkeypatch.setattr(IncomingFile, "write", full)
    with pytest.raises(ModelFilesError, match=r"cannot write the model cache .*No space left on device.*DYN_CACHE_DIR"):
        await fetch_files(runtime, card)
    assert leftovers(cache) == []


async def test_an_unusable_cache_is_a_clear_error(
    runtime: DistributedRuntime, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DYN_CACHE_DIR", str(tmp_path / "file"))
    card = await register(runtime, model_dir)
    with pytest.raises(ModelFilesError, match="set DYN_CACHE_DIR"):
        await fetch_files(runtime, card)


async def test_a_card_with_a_path_for_a_name_is_refused(runtime: DistributedRuntime, model_dir: Path) -> None:
    card = await register(runtime, model_dir)
    card.files = [CardFile("../escaped", card.files[0].checksum, card.files[0].size)]
    with pytest.raises(InvalidArgument, match="is not a plain file name"):
        await fetch_files(runtime, card)


def test_an_assembly_that_lost_the_race_takes_the_winner_s(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "config.json"
    source.write_bytes(b"{}")
    files = [CardFile("config.json", file_checksum(source), 2)]
    one, other = ModelCache(cache), ModelCache(cache)
    for each in (one, other):
        incoming = each.begin(files[0])
        incoming.write(b"{}")
        incoming.finish()
    assert one.assemble(files) == other.assemble(files) == cache / "snapshots" / files_digest(files)
