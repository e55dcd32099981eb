"""What does a worker read of its place, and what follows for KV?"""

import asyncio
from pathlib import Path

import pytest

from dynamo.llm import topology
from dynamo.llm.model_card import ModelRuntimeConfig
from dynamo.llm.topology import Near, near, read_topology, taints_of
from dynamo.runtime.errors import InvalidArgument


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as Kubernetes mounts a pod's labels, and the variables that name it."""
    hidden = tmp_path / "..2026_11_24"
    hidden.mkdir()
    (hidden / "rack").write_text(" r7\n")
    (tmp_path / "..data").symlink_to(hidden)
    (tmp_path / "rack").symlink_to(tmp_path / "..data" / "rack")
    (tmp_path / "zone").write_text("east-1")
    (tmp_path / "empty").write_text(" \n")
    monkeypatch.setenv("DYN_TOPOLOGY_ENABLED", "true")
    monkeypatch.setenv("DYN_TOPOLOGY_MOUNT_PATH", str(tmp_path))
    monkeypatch.setenv("DYN_KV_TRANSFER_DOMAIN", "rack")
    return tmp_path


async def test_nothing_is_read_unless_asked(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYN_TOPOLOGY_ENABLED")
    assert await read_topology() is None


async def test_files_are_places_and_hidden_or_empty_ones_are_not(labels: Path) -> None:
    found = await read_topology()
    assert found is not None
    assert found.domains == {"rack": "r7", "zone": "east-1"}
    config = ModelRuntimeConfig(taints={"slow"})
    found.write(config)
    assert taints_of(config) == {"slow", "dynamo.topology/rack=r7", "dynamo.topology/zone=east-1"}
    assert near(config) == Near("dynamo.topology/rack=r7")


async def test_a_preference_has_a_weight(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KV_TRANSFER_ENFORCEMENT", "preferred")
    config = ModelRuntimeConfig()
    for text, weight in (("", topology.DEFAULT_WEIGHT), ("0.5", 0.5)):
        monkeypatch.setenv("DYN_KV_TRANSFER_PREFERRED_WEIGHT", text)
        found = await read_topology()
        assert found is not None
        found.write(config)
        assert near(config) == Near("dynamo.topology/rack=r7", weight)


async def test_a_label_that_is_written_late_is_waited_for(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "LOOK_S", 0.01)
    monkeypatch.setenv("DYN_KV_TRANSFER_DOMAIN", "block")
    reading = asyncio.ensure_future(read_topology())
    await asyncio.sleep(0.05)  # nothing must happen
    assert not reading.done()
    (labels / "block").write_text("b1")
    found = await reading
    assert found is not None
    assert found.domains["block"] == "b1"


async def test_a_label_that_never_comes_ends_the_start(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KV_TRANSFER_DOMAIN", "block")
    with pytest.raises(ValueError, match=r"DYN_KV_TRANSFER_DOMAIN: there is no .*/block, or nothing in it"):
        await read_topology(wait_s=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DYN_TOPOLOGY_ENABLED", "perhaps"),
        ("DYN_KV_TRANSFER_DOMAIN", " "),
        ("DYN_KV_TRANSFER_ENFORCEMENT", "strict"),
        ("DYN_KV_TRANSFER_PREFERRED_WEIGHT", "1.5"),
        ("DYN_KV_TRANSFER_PREFERRED_WEIGHT", "much"),
    ],
)
async def test_a_wrong_variable_is_named(labels: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        await read_topology()


@pytest.mark.parametrize(
    ("config", "param"),
    [
        (ModelRuntimeConfig(kv_transfer_domain="zone"), "kv_transfer_domain"),
        (ModelRuntimeConfig(kv_transfer_enforcement="strict"), "kv_transfer_enforcement"),
        (ModelRuntimeConfig(kv_transfer_preferred_weight=2.0), "kv_transfer_preferred_weight"),
    ],
)
def test_a_card_that_cannot_be_meant_is_refused(config: ModelRuntimeConfig, param: str) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        topology.check(config)
    assert wrong.value.param == param


def test_a_place_that_a_foreign_card_does_not_name_is_one_where_nobody_is() -> None:
    wanted = near(ModelRuntimeConfig(topology_domains={"zone": "east"}, kv_transfer_domain="rack"))
    assert wanted is not None
    assert wanted.weight is None
    assert wanted.taint not in taints_of(ModelRuntimeConfig(topology_domains={"zone": "east", "rack": "r1"}))


def test_without_a_kind_of_place_kv_may_go_anywhere() -> None:
    assert near(ModelRuntimeConfig(topology_domains={"zone": "east"})) is None
