"""By which way does KV pass, what is in a KV file, and what does an engine begin with? No engine is started."""

import os
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.request import RequestStatus
from vllm.v1.sample.logits_processor import BatchUpdate

from dynamo.vllm import spinning, transport
from dynamo.vllm.driver import FIRST_TOKEN
from dynamo.vllm.first_token import FirstToken
from dynamo.vllm.kv_directory import LEFT_BEHIND_S, file_path, open_directory
from dynamo.vllm.kv_files import FileConnector
from dynamo.vllm.transport import TransferOptions, Transport, choose

pytestmark = pytest.mark.vllm

BLOCKS, BLOCK = 12, 4


# --- the choice


def test_the_users_own_connector_wins() -> None:
    chosen = choose(TransferOptions("shm"), SimpleNamespace(kv_connector="ExampleConnector"))
    assert (chosen.name, chosen.directory) == ("ExampleConnector", None)


def test_nixl_is_taken_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_why_not_nixl", lambda: None)
    assert choose(TransferOptions(), None).name == "nixl"


def test_files_are_taken_where_nixl_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transport, "_why_not_nixl", lambda: "NIXL is not installed")
    chosen = choose(TransferOptions(directory=tmp_path / "kv"), None)
    assert (chosen.name, chosen.directory) == ("shm", tmp_path / "kv")
    assert "NIXL is not installed" in chosen.why


def test_nixl_that_was_asked_for_and_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_why_not_nixl", lambda: "NIXL is not installed")
    with pytest.raises(ValueError, match="--kv-transport nixl: NIXL is not installed; install it"):
        choose(TransferOptions("nixl"), None)


# --- the directory


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="--kv-transfer-dir"):
        open_directory(tmp_path / "kv")


def test_only_what_killed_workers_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "kv"
    open_directory(place)
    old, young, foreign = place / ("a" * 32), place / ("b" * 32), place / "notes"
    for file in (old, young, foreign):
        file.write_bytes(b"")
    for file in (old, foreign):
        os.utime(file, (0, young.stat().st_mtime - LEFT_BEHIND_S - 60))
    open_directory(place)
    assert [file.exists() for file in (old, young, foreign)] == [False, True, True]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 31, "A" * 32, "", None, "a" * 32 + "\n"])
def test_no_name_from_outside_becomes_a_path(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="is not the name of a KV file"):
        file_path(tmp_path, name)


# --- the files


class Side:
    """One worker's connector, both halves, with a cache of two layers."""

    def __init__(self, directory: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cache = {f"layer{i}": torch.rand(BLOCKS, 2, BLOCK, 8, generator=generator) for i in range(2)}
        extra = {"directory": str(directory)}
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(get_from_extra_config=extra.get, is_kv_producer=True),
            parallel_config=SimpleNamespace(world_size=1),
            cache_config=SimpleNamespace(block_size=BLOCK),
        )
        kinds = SimpleNamespace(kv_cache_groups=[None], num_blocks=BLOCKS)
        self.scheduler = FileConnector(config, KVConnectorRole.SCHEDULER, kinds)
        self.worker = FileConnector(config, KVConnectorRole.WORKER, kinds)
        self.worker.register_kv_caches(self.cache)
        self.tables: dict[str, list[int]] = {}
        self.scheduler._kv_cache_manager = SimpleNamespace(get_block_ids=lambda id_: (self.tables[id_],))

    def step(self, **scheduled: int) -> Any:
        """One engine step; returns what the worker reports."""
        work = self.scheduler.build_connector_meta(SimpleNamespace(num_scheduled_tokens=scheduled))
        self.worker.bind_connector_metadata(work)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        return self.worker.get_transfer_results(set())

    def blocks(self, ids: list[int]) -> list[torch.Tensor]:
        return [cache[ids] for cache in self.cache.values()]


def a_request(id_: str, tokens: int, params: dict[str, Any]) -> Any:
    return SimpleNamespace(
        request_id=id_, num_prompt_tokens=tokens, num_computed_tokens=0, kv_transfer_params=params,
        status=RequestStatus.FINISHED_LENGTH_CAPPED,
    )  # fmt: skip


def save(side: Side, tokens: int, table: list[int]) -> dict[str, Any]:
    """Compute a prompt in two chunks and end the request: the handle's parameters."""
    wanted = a_request("p", tokens, {"do_remote_decode": True})
    side.tables["p"] = table
    side.scheduler.on_new_request(wanted)
    side.step(p=1)
    wanted.num_computed_tokens = 1
    side.step(p=tokens - 1)
    delayed, params = side.scheduler.request_finished_all_groups(wanted, (table,))
    assert not delayed
    assert params is not None
    return params


def load(side: Side, tokens: int, table: list[int], params: dict[str, Any], computed: int = 0, *, more: int = 0) -> Any:
    """Take over a prompt with `more` tokens behind it."""
    wanted = a_request("d", tokens + more, dict(params))
    assert side.scheduler.get_num_new_matched_tokens(wanted, computed) == (tokens - computed, True)
    blocks = SimpleNamespace(get_block_ids=lambda: (table,))
    side.scheduler.update_state_after_alloc(wanted, blocks, tokens - computed)
    return side.step()


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Side, Side]:
    open_directory(tmp_path / "kv")
    return Side(tmp_path / "kv", 1), Side(tmp_path / "kv", 2)


def test_blocks_arrive_as_they_were(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    params = save(prefill, 10, [3, 1, 7])
    results = load(decode, 10, [5, 9, 0], params)
    assert (results.finished_recving, results.failed_recving) == ({"d"}, set())
    for theirs, ours in zip(prefill.blocks([3, 1, 7]), decode.blocks([5, 9, 0]), strict=True):
        assert torch.equal(theirs, ours)
    stats = decode.worker.get_kv_connector_stats()
    assert stats is not None
    assert stats.data["bytes_transferred"] == [3 * 2 * (2 * BLOCK * 8 * 4)]


def test_blocks_that_are_here_already_are_left_alone(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    params = save(prefill, 10, [3, 1, 7])
    before = [cache.clone() for cache in decode.cache.values()]
    load(decode, 10, [5, 9, 0], params, computed=BLOCK)
    for cache, old in zip(decode.cache.values(), before, strict=True):
        assert torch.equal(cache[5], old[5])
    assert torch.equal(decode.blocks([9])[0], prefill.blocks([1])[0])


@pytest.mark.parametrize("tokens", [10, 12])
def test_a_first_token_behind_the_prompt_is_not_looked_for(sides: tuple[Side, Side], tokens: int) -> None:
    prefill, decode = sides
    params = save(prefill, tokens, [3, 1, 7])
    results = load(decode, tokens, [5, 9, 0], params, more=1)
    assert (results.finished_recving, results.failed_recving) == ({"d"}, set())
    for theirs, ours in zip(prefill.blocks([3, 1, 7]), decode.blocks([5, 9, 0]), strict=True):
        assert torch.equal(theirs, ours)


def test_a_file_that_is_gone_changed_or_of_another_prompt_is_a_failed_load(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    prefill, decode = sides
    params = save(prefill, 10, [3, 1, 7])
    path = tmp_path / "kv" / params["file"]
    content = path.read_bytes()
    for tampered in (content[:-1] + bytes([content[-1] ^ 1]), content[:-5], b"nonsense", b""):
        path.write_bytes(tampered)
        assert load(decode, 10, [5, 9, 0], params).failed_recving == {"d"}
    path.write_bytes(content)
    assert load(decode, 14, [5, 9, 0, 2], params).failed_recving == {"d"}
    path.unlink()
    assert load(decode, 10, [5, 9, 0], params).failed_recving == {"d"}
    assert load(decode, 10, [5, 9, 0], {"do_remote_prefill": True, "file": "../x"}).failed_recving == {"d"}


def test_an_aborted_prefill_leaves_no_file(sides: tuple[Side, Side], tmp_path: Path) -> None:
    prefill, _ = sides
    wanted = a_request("p", 10, {"do_remote_decode": True})
    prefill.tables["p"] = [1, 2, 3]
    prefill.scheduler.on_new_request(wanted)
    prefill.step(p=10)
    wanted.status = RequestStatus.FINISHED_ABORTED
    assert prefill.scheduler.request_finished_all_groups(wanted, ([1, 2, 3],)) == (False, None)
    assert list((tmp_path / "kv").iterdir()) == []


def test_a_full_disk_costs_the_handle_not_the_engine(
    sides: tuple[Side, Side], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = sides

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynamo.vllm.kv_files.os.open", full)
    params = save(prefill, 10, [3, 1, 7])
    assert load(decode, 10, [5, 9, 0], params).failed_recving == {"d"}


# --- the first token


def test_an_engine_can_only_begin_with_the_clients_token() -> None:
    processor = FirstToken(None, torch.device("cpu"), is_pin_memory=False)
    outputs: list[list[int]] = [[], [], [9]]
    params = [SimpleNamespace(extra_args=extra) for extra in ({FIRST_TOKEN: 3}, None, {FIRST_TOKEN: 4})]
    added = [(row, params[row], None, outputs[row]) for row in range(3)]
    processor.update_state(BatchUpdate(3, (), added, ()))
    logits = processor.apply(torch.zeros(3, 6))
    assert logits[0].argmax() == 3
    assert logits[0].softmax(0)[3] == 1
    assert torch.equal(logits[1:], torch.zeros(2, 6))
    outputs[0].append(3)
    processor.update_state(None)
    assert torch.equal(processor.apply(torch.zeros(3, 6)), torch.zeros(3, 6))


# --- an engine that has nothing to compute


class Condition:
    """Remembers how long its one caller would have waited."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def __enter__(self) -> None:
        """Nobody else is here."""

    def __exit__(self, *error: object) -> None:
        """Nobody else is here."""

    def wait(self, limit_s: float) -> None:
        self.waited.append(limit_s)


class Core:
    """As much of vLLM's engine core as its step between steps touches."""

    def __init__(self, *, executed: bool = False, unfinished: bool = False, arrived: bool = False) -> None:
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.waits = Condition()
        self.input_queue = SimpleNamespace(queue=[], not_empty=self.waits)
        self.scheduler = SimpleNamespace(
            has_requests=lambda: True,
            has_unfinished_requests=lambda: unfinished,
            finished_recving_kv_req_ids={"r"} if arrived else set(),
        )
        self.step_fn = lambda: ({0: "output"}, executed)
        self.post_step = lambda executed: None
        spinning.wait_for_requests(Core)

    def step(self) -> bool:
        done: bool = self._process_engine_step()  # type: ignore[attr-defined]
        return done


def test_an_engine_that_computed_goes_on_at_once() -> None:
    core = Core(executed=True, unfinished=True)
    assert core.step()
    assert core.waits.waited == []
    assert core.output_queue.get_nowait() == (0, "output")


@pytest.mark.parametrize(("unfinished", "limit_s"), [(True, spinning.LOOK_S), (False, spinning.KEPT_S)])
def test_it_waits_longer_for_readers_than_for_kv(unfinished: bool, limit_s: float) -> None:
    core = Core(unfinished=unfinished)
    assert not core.step()
    assert core.waits.waited == [limit_s]


def test_kv_that_has_arrived_is_gone_on_from_at_once() -> None:
    core = Core(unfinished=True, arrived=True)
    core.step()
    assert core.waits.waited == []


def test_a_request_that_came_meanwhile_is_not_kept_waiting() -> None:
    core = Core()
    core.input_queue.queue.append("request")
    core.step()
    assert core.waits.waited == []


# --- another role


def test_an_engine_without_a_way_for_kv_keeps_its_role_and_says_what_would_help() -> None:
    assert "start it with --kv-transport" in str(transport.why_no_change(None, None))


@pytest.mark.parametrize(("kv_role", "can"), [("kv_both", True), ("kv_producer", False), ("kv_consumer", False)])
def test_a_connector_of_the_users_for_one_role_keeps_it(kv_role: str, can: bool) -> None:
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_role=kv_role))
    why = transport.why_no_change(config, Transport("ExampleConnector", "the user says so"))
    assert (why is None) == can
    assert can or kv_role in str(why)
