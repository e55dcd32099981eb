"""Does KV stay in its place, whatever routes the requests? [K48]"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dynamo.frontend.service import FrontendService
from tests.frontend.front_door import CHAT, Answer, StartFrontend, ask, changed, chat, model_ready
from tests.frontend.kv_fleet import Mocker, StartMocker, series

MODES = ["round-robin", "random", "power-of-two", "least-loaded", "device-aware-weighted", "kv"]
PREFILL, DECODE = ("--disaggregation-mode", "prefill"), ("--disaggregation-mode", "decode")


class Places:
    """A fleet whose workers stand in places."""

    def __init__(
        self, start: StartMocker, directory: Path, patch: pytest.MonkeyPatch, service: FrontendService
    ) -> None:
        self._start = start
        self._directory = directory
        self._patch = patch
        self.service = service
        self.places: dict[int, str] = {}

    async def add(self, zone: str, role: tuple[str, str], **policy: str) -> Mocker:
        """Start a worker in a zone."""
        where = self._directory / zone
        where.mkdir(exist_ok=True)
        (where / "zone").write_text(f"{zone}\n")
        environ = {"ENFORCEMENT": "required", "PREFERRED_WEIGHT": "", "DOMAIN": "zone"} | policy
        self._patch.setenv("DYN_TOPOLOGY_ENABLED", "1")
        self._patch.setenv("DYN_TOPOLOGY_MOUNT_PATH", str(where))
        for name, value in environ.items():
            self._patch.setenv(f"DYN_KV_TRANSFER_{name}", value)
        worker = await self._start("--speedup-ratio", "0", *role)
        self.places[worker.instance_id] = zone
        await model_ready_or_prefill(self.service, len(self.places))
        return worker

    async def ask(self, number: int, **fields: Any) -> tuple[Answer, dict[str, Any]]:
        """One request; where its halves were done."""
        nvext = {"extra_fields": ["worker_id", "routing"], **fields.pop("nvext", {})}
        answer = await ask(self.service.port, CHAT, chat(f"Question {number}", max_tokens=4, nvext=nvext, **fields))
        assert answer.status == 200, answer.body
        return answer, answer.json()["nvext"]

    async def pairs(self, count: int) -> Counter[tuple[str, str]]:
        """How often KV went from where to where."""
        found: Counter[tuple[str, str]] = Counter()
        for number in range(count):
            _, nvext = await self.ask(number)
            ids = nvext["worker_id"]
            found[self.places[ids["prefill_worker_id"]], self.places[ids["decode_worker_id"]]] += 1
        return found


async def model_ready_or_prefill(service: FrontendService, workers: int) -> None:
    """Wait until so many workers are known, of whatever kind."""
    await changed(service, lambda: sum(s.worker_count for s in service.models.sets()) == workers)


@pytest.fixture
async def places(
    request: pytest.FixtureRequest,
    start_frontend: StartFrontend,
    start_mocker: StartMocker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Places:
    mode = getattr(request, "param", "round-robin")
    return Places(start_mocker, tmp_path, monkeypatch, await start_frontend(router_mode=mode))


async def two_zones(places: Places, **policy: str) -> None:
    for zone in ("east", "west"):
        await places.add(zone, DECODE, **policy)
        await places.add(zone, PREFILL, **policy)
    await model_ready(places.service, "tiny", workers=4)
    await changed(places.service, lambda: any(s.prefill is not None for s in places.service.models.sets()))


@pytest.mark.parametrize("places", MODES, indirect=True)
async def test_what_is_required_is_so_for_every_request(places: Places) -> None:
    await two_zones(places)
    await places.add("west", DECODE)  # so that turns taken in both pools do not go together by chance
    pairs = await places.pairs(24)
    assert set(pairs) <= {("east", "east"), ("west", "west")}
    assert sum(pairs.values()) == 24


@pytest.mark.parametrize("places", ["random"], indirect=True)
async def test_what_is_preferred_is_so_for_most(places: Places) -> None:
    await two_zones(places, ENFORCEMENT="preferred", PREFERRED_WEIGHT="1.0")
    pairs = await places.pairs(120)
    near = sum(count for (one, other), count in pairs.items() if one == other)
    # tanh(1) = 76 % always near, and half of the rest: 106 of 120, give or take 3.6. One in ten million is outside.
    assert 85 <= near < 120


@pytest.mark.parametrize("places", ["kv"], indirect=True)
async def test_a_kv_router_weighs_what_is_preferred_and_says_so(places: Places) -> None:
    await two_zones(places, ENFORCEMENT="preferred", PREFERRED_WEIGHT="1.0")
    pairs = await places.pairs(24)
    assert set(pairs) == {("east", "east"), ("west", "west")}  # both are idle, so the near one is always cheaper
    _, nvext = await places.ask(99)
    zone = places.places[nvext["worker_id"]["prefill_worker_id"]]
    near = {"taint": f"dynamo.topology/zone={zone}", "enforcement": "preferred", "weight": 1.0}
    assert nvext["routing"]["near"] == near


@pytest.mark.parametrize("places", ["round-robin", "kv"], indirect=True)
async def test_where_nobody_may_have_the_kv_a_decode_worker_computes_the_prompt(places: Places) -> None:
    await places.add("east", DECODE)
    await places.add("west", PREFILL)
    await changed(places.service, lambda: any(s.prefill is not None for s in places.service.models.sets()))
    for number in range(4):
        answer, _ = await places.ask(number)
        assert answer.json()["usage"]["completion_tokens"] == 4
    prefills = await series(places.service, "dynamo_frontend_remote_prefills_total")
    assert prefills == {'outcome="unpaired"': 4.0}


@pytest.mark.parametrize("places", ["round-robin", "kv", "direct"], indirect=True)
async def test_a_pin_to_a_far_worker_is_followed_and_the_kv_stays(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    await two_zones(places)
    sets = {s.key.component: s for s in places.service.models.sets()}
    for prefill in sets["prefill"].workers:
        for decode in sets["backend"].workers:
            caplog.clear()
            pins = {"prefill_worker_id": prefill, "decode_worker_id": decode}
            answer, nvext = await places.ask(prefill % 1000 + decode, nvext=pins)
            assert nvext["worker_id"]["prefill_worker_id"] == prefill
            assert nvext["worker_id"]["decode_worker_id"] == decode
            assert answer.json()["usage"]["completion_tokens"] == 4
            far = places.places[prefill] != places.places[decode]
            assert ("KV is not used" in caplog.text) == far


async def test_workers_without_a_place_are_nobodys_neighbours(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    await two_zones(places)
    monkeypatch.delenv("DYN_TOPOLOGY_ENABLED")
    stray = await places._start("--speedup-ratio", "0", *DECODE)
    places.places[stray.instance_id] = "nowhere"
    await model_ready(places.service, "tiny", workers=5)
    assert set(await places.pairs(12)) <= {("east", "east"), ("west", "west")}
