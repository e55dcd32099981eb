"""How does a frontend get the files of a model without sharing a disk with its workers?

A worker serves the files of its card on the endpoint `{namespace}.{component}.model_files`, in chunks, by the
checksum of their content. A frontend keeps what it fetched in a cache by content hash:

    {cache}/blobs/{hash}                 a file's content
    {cache}/snapshots/{hash}/{name}      the files of one card, hard links to blobs

Everything is written beside its place and renamed into it, so any number of processes may share a cache.
Checksums are verified when a file is fetched and whenever a cached one is used.
"""

import asyncio
import errno
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

import blake3
import msgspec

from dynamo.llm.model_card import CardFile, ModelDeploymentCard, check_files
from dynamo.llm.model_directory import file_checksum, model_files
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.client import Client
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import ConnectionTimeout, DynamoException, InvalidArgument

ENDPOINT = "model_files"
CHUNK_BYTES = 1 << 20  # far below the 32 MiB of a frame, far above the cost of a request
CHUNK_TIMEOUT_S = 10.0  # a chunk takes milliseconds; a worker that takes this long is left for another
FIND_TIMEOUT_S = 5.0  # a card may be seen this much earlier than the instance that serves its files


class ModelFilesError(DynamoException):
    """The files of a model could not be had: no worker gave them, or they could not be written here."""


class FileRequest(msgspec.Struct):
    """Ask for the part of a file that begins at `offset` (bytes)."""

    checksum: str
    offset: int


class FileChunk(msgspec.Struct):
    """Up to 1 MiB of a file, and how long the whole of it is (bytes)."""

    data: bytes
    size: int


# --- the worker's side


class ModelFileServer:
    """What one component of a process serves: exactly the files of the cards it published, by content hash."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}

    def replace(self, files: Iterable[tuple[str, Path]]) -> None:
        """Serve these (checksum, path) and nothing else."""
        self._paths = dict(files)

    async def handle(self, request: dict[str, Any]) -> AsyncIterator[FileChunk]:
        """The endpoint's handler. Raises InvalidArgument for a file that no card lists."""
        try:
            wanted = msgspec.convert(request, FileRequest)
        except msgspec.ValidationError as e:
            raise InvalidArgument(f"malformed request for a model file: {e}") from None
        path = self._paths.get(wanted.checksum)
        if path is None:
            raise InvalidArgument(f"no model file here has the checksum {wanted.checksum[:80]!r}", "checksum")
        if wanted.offset < 0:
            raise InvalidArgument(f"offset must be at least 0, got {wanted.offset}", "offset")
        try:
            yield await asyncio.to_thread(_read_chunk, path, wanted.offset)
        except OSError as e:
            raise ModelFilesError(f"cannot read {path.name}: {e.strerror or e}") from None


def _read_chunk(path: Path, offset: int) -> FileChunk:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(min(offset, size))
        return FileChunk(file.read(CHUNK_BYTES), size)


# --- the frontend's side

_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""One fetch of a card's files at a time in this process; others wait for it and find the files."""


async def fetch_files(runtime: DistributedRuntime, card: ModelDeploymentCard, instance_id: int | None = None) -> Path:
    """A local directory with the files of `card`.

    It is the worker's own directory if that can be read here with the same content, else one in the cache
    (`DYN_CACHE_DIR`, default `~/.cache/dynamo/models`), filled from a worker where it must be: from `instance_id`
    if it serves files, else from any worker of the card's component.

    Raises:
        ModelFilesError: no worker gave the files, or the cache cannot be written.
        InvalidArgument: the card's list of files is not one to be trusted.
    """
    check_files(card.files)
    source = Path(card.source_path)
    if card.source_path:
        same: bool = await asyncio.to_thread(holds_exactly, source, card.files)
        if same:
            return source
    cache = ModelCache(cache_root())
    key = files_digest(card.files)
    lock = _locks.setdefault(key, asyncio.Lock())
    async with lock:
        found = await asyncio.to_thread(cache.find, card.files)
        if found is not None:
            return found
        missing = await asyncio.to_thread(cache.missing, card.files)
        if missing:
            await _fetch(runtime, card, instance_id, cache, missing)
        return await asyncio.to_thread(cache.assemble, card.files)


def cache_root() -> Path:
    """Where fetched files are kept."""
    return Path(os.environ.get("DYN_CACHE_DIR") or Path.home() / ".cache" / "dynamo" / "models")


def files_digest(files: list[CardFile]) -> str:
    """A name for exactly these files: 64 hex digits."""
    return blake3.blake3(msgspec.json.encode(sorted((file.name, file.checksum) for file in files))).hexdigest()


def holds_exactly(directory: Path, files: list[CardFile]) -> bool:
    """Whether the directory has these files with this content, and no other that a frontend would read."""
    try:
        names = model_files(directory).keys()
    except InvalidArgument:
        return False
    return names == {file.name for file in files} and all(_is_intact(directory / file.name, file) for file in files)


def _is_intact(path: Path, file: CardFile) -> bool:
    try:
        return path.is_file() and path.stat().st_size == file.size and file_checksum(path) == file.checksum
    except OSError:
        return False


class ModelCache:
    """The cache on this machine's disk. Any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._snapshots = root / "snapshots"

    def find(self, files: list[CardFile]) -> Path | None:
        """The directory of these files, if it is there and intact."""
        snapshot = self._snapshots / files_digest(files)
        return snapshot if all(_is_intact(snapshot / file.name, file) for file in files) and files else None

    def missing(self, files: list[CardFile]) -> list[CardFile]:
        """The files whose content is not here, or damaged."""
        return [file for file in files if not _is_intact(self._blob(file), file)]

    def _blob(self, file: CardFile) -> Path:
        return self._blobs / file.checksum.removeprefix("blake3:")

    def begin(self, file: CardFile) -> "IncomingFile":
        """Start to write a file's content. Raises ModelFilesError."""
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            return IncomingFile(self._blob(file), file)
        except OSError as e:
            raise self.failure(e) from None

    def assemble(self, files: list[CardFile]) -> Path:
        """Make the directory of files whose content is here. Raises ModelFilesError."""
        snapshot = self._snapshots / files_digest(files)
        beside = snapshot.with_name(f".{snapshot.name}.{secrets.token_hex(8)}")
        try:
            beside.mkdir(parents=True)
            for file in files:
                (beside / file.name).parent.mkdir(exist_ok=True)
                _link_or_copy(self._blob(file), beside / file.name)
            self._put_in_place(beside, snapshot, files)
        except OSError as e:
            raise self.failure(e) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return snapshot

    def _put_in_place(self, beside: Path, snapshot: Path, files: list[CardFile]) -> None:
        try:
            beside.rename(snapshot)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.find(files) is None:  # a damaged one is in the way; if another process made one, theirs is as good
                snapshot.rename(beside.with_suffix(".damaged"))
                shutil.rmtree(beside.with_suffix(".damaged"), ignore_errors=True)
                beside.rename(snapshot)

    def failure(self, error: OSError) -> ModelFilesError:
        """What to tell when the disk refuses."""
        return ModelFilesError(
            f"cannot write the model cache {self.root}: {error.strerror or error}; free space or set DYN_CACHE_DIR"
        )


def _link_or_copy(blob: Path, target: Path) -> None:
    try:
        os.link(blob, target)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(blob, target)


class IncomingFile:
    """A file being fetched: written beside its place, checked, and renamed into it."""

    def __init__(self, place: Path, file: CardFile) -> None:
        self._place = place
        self._wanted = file
        self._beside = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
        self._file: IO[bytes] = self._beside.open("xb")
        self._hasher = blake3.blake3()
        self.written = 0

    def write(self, data: bytes) -> None:
        """Add the next bytes. Raises OSError."""
        self._file.write(data)
        self._hasher.update(data)
        self.written += len(data)

    def finish(self) -> None:
        """Put the file in its place. Raises OSError, or ModelFilesError if the content is not what was wanted."""
        self._file.close()
        if f"blake3:{self._hasher.hexdigest()}" != self._wanted.checksum:
            raise ModelFilesError(f"{self._wanted.name} came with another content than the model card says")
        self._beside.replace(self._place)

    def discard(self) -> None:
        """Leave nothing behind unless it was finished."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


async def _fetch(
    runtime: DistributedRuntime,
    card: ModelDeploymentCard,
    instance_id: int | None,
    cache: ModelCache,
    missing: list[CardFile],
) -> None:
    """Get the content of `missing` from the first worker that has it."""
    address = _files_address(card)
    client = await runtime.endpoint(address).client()
    try:
        await client.wait_for_instances(FIND_TIMEOUT_S)
    except ConnectionTimeout:
        raise ModelFilesError(f"no worker serves the files of model {card.display_name} ({address})") from None
    known = client.instance_ids()
    last: DynamoException | None = None
    for worker in sorted(known, key=lambda each: each != instance_id):
        try:
            for file in missing:
                await _fetch_file(client, worker, cache, file)
        except DynamoException as e:
            last = e
            continue
        return
    raise ModelFilesError(f"no worker gave the files of model {card.display_name}: {last}")


def _files_address(card: ModelDeploymentCard) -> str:
    try:
        serving = EndpointAddress.parse(card.endpoint)
    except ValueError:
        raise InvalidArgument(f"the card of model {card.display_name} does not say which endpoint serves it") from None
    return f"{serving.namespace}.{serving.component}.{ENDPOINT}"


async def _fetch_file(client: Client, worker: int, cache: ModelCache, file: CardFile) -> None:
    incoming = cache.begin(file)
    try:
        while incoming.written < file.size or not incoming.written:
            chunk = await _fetch_chunk(client, worker, FileRequest(file.checksum, incoming.written))
            if chunk.size != file.size or (not chunk.data and file.size):
                raise ModelFilesError(f"{file.name} has {chunk.size} bytes at the worker, {file.size} in its card")
            await asyncio.to_thread(incoming.write, chunk.data)
            if not file.size:
                break
        await asyncio.to_thread(incoming.finish)
    except OSError as e:
        raise cache.failure(e) from None
    finally:
        await asyncio.to_thread(incoming.discard)


async def _fetch_chunk(client: Client, worker: int, request: FileRequest) -> FileChunk:
    try:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            answers = await client.direct(request, worker, annotated=False)
            async for answer in answers:
                await answers.aclose()
                return msgspec.convert(answer, FileChunk)
    except TimeoutError:
        raise ConnectionTimeout(f"worker {worker:x} sent no part of a model file for {CHUNK_TIMEOUT_S:g} s") from None
    except msgspec.ValidationError as e:
        raise ModelFilesError(f"worker {worker:x} sent something else than a part of a file: {e}") from None
    raise ModelFilesError(f"worker {worker:x} sent no part of the file")
