"""How does a worker serve that is half of a pair?"""

from pathlib import Path
from typing import Any

import pytest

from dynamo.engine.handoff import NO_HANDOFF, Ledger
from dynamo.engine.seat import path_of
from dynamo.engine.serving import EngineWorker, ServeOptions, health_check_request
from dynamo.engine.takeover import Claims
from dynamo.engine.worker_args import ROLES, WorkerOptions
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import DiscoveryError, InvalidArgument, WorkerOverloaded
from tests.engine.scripted import DEADLINE_S, ScriptedEngine, collect, request, serving


class SplitScripted(ScriptedEngine):
    handoff: Ledger | Claims

    def bind_handoff(self, handoff: Ledger | Claims) -> None:
        self.handoff = handoff


@pytest.mark.parametrize(("role", "worker_type"), [("prefill", "prefill"), ("decode", "decode")])
async def test_a_role_is_shown_in_the_model_card(
    runtime: DistributedRuntime, model_dir: Path, role: Any, worker_type: str
) -> None:
    engine = SplitScripted()
    async with serving(runtime, engine, model_dir, disaggregation_mode=role, endpoint=f"dynamo.{role}.generate"):
        (card,) = (await runtime.discovery.get_prefix("v1/mdc/")).values()
        assert f'"worker_type":"{worker_type}"'.encode() in card
        assert isinstance(engine.handoff, Ledger if role == "prefill" else Claims)


async def test_a_prefill_worker_can_be_asked_for_its_kv(runtime: DistributedRuntime, model_dir: Path) -> None:
    options = {"disaggregation_mode": "prefill", "endpoint": "dynamo.prefill.generate"}
    async with serving(runtime, SplitScripted(), model_dir, **options) as (worker, _):
        client = await runtime.endpoint("dynamo.prefill.handoff").client()
        assert await client.wait_for_instances(DEADLINE_S) == [worker.endpoint.instance_id]
        (answer,) = await collect(await client.generate({"verb": "release", "id": "x"}, annotated=False))
        assert answer == {"ok": False, "reason": "unknown"}


async def test_an_engine_that_does_whole_requests_only_says_so(runtime: DistributedRuntime, model_dir: Path) -> None:
    with pytest.raises(ValueError, match="--disaggregation-mode prefill: this engine does whole requests only"):
        EngineWorker(runtime, ScriptedEngine(), ServeOptions(model_dir, WorkerOptions(disaggregation_mode="prefill")))


async def test_a_prefill_worker_makes_one_choice_of_many(runtime: DistributedRuntime, model_dir: Path) -> None:
    engine = SplitScripted()
    async with serving(runtime, engine, model_dir, disaggregation_mode="prefill") as (_, client):
        stream = await client.generate(request(n=3), annotated=False)
        (id_,) = await engine.submissions(1)
        engine.step((id_, 5), finish=True)
        assert [item["token_ids"] for item in await collect(stream)] == [[5]]
        assert len(engine.submitted) == 1


async def test_further_choices_start_once_the_first_has_its_kv(runtime: DistributedRuntime, model_dir: Path) -> None:
    engine = SplitScripted()
    async with serving(runtime, engine, model_dir, disaggregation_mode="decode") as (_, client):
        stream = await client.generate(
            request(n=3, seed=10) | {"prefill_result": {"disaggregated_params": {}}}, annotated=False
        )
        (first,) = await engine.submissions(1)
        assert engine.submitted[first].prefill_result is not None
        engine.step((first, 5))
        others = (await engine.submissions(3))[1:]
        assert [engine.submitted[id_].prefill_result for id_ in others] == [None, None]
        assert [engine.submitted[id_].sampling_options.seed for id_ in others] == [11, 12]
        engine.step(*((id_, 6) for id_ in engine.submitted), finish=True)
        items = await collect(stream)
        assert [(item.get("index", 0), item["token_ids"]) for item in items] == [(0, [5]), (0, [6]), (1, [6]), (2, [6])]


async def test_a_refused_further_choice_ends_the_request(runtime: DistributedRuntime, model_dir: Path) -> None:
    engine = SplitScripted()
    async with serving(runtime, engine, model_dir, disaggregation_mode="decode") as (_, client):
        stream = await client.generate(request(n=2) | {"prefill_result": {"disaggregated_params": {}}}, annotated=False)
        (first,) = await engine.submissions(1)
        engine.refuse = WorkerOverloaded("full")
        engine.step((first, 5))
        with pytest.raises(WorkerOverloaded):
            await collect(stream)
        assert first in engine.aborted


class Changing(SplitScripted):
    """Has a way in for each role, and says in each id by which it came."""

    def take_role(self, handoff: Ledger | Claims | None) -> Any:
        kind = type(handoff).__name__
        return lambda id_, wanted: self.submit(f"{kind} {id_}", wanted)


async def test_requests_go_in_by_the_role_of_the_endpoint_that_they_came_to(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    engine = Changing()
    async with serving(runtime, engine, model_dir, disaggregation_mode="decode") as (worker, before):
        old = await before.generate(request(), annotated=False)
        (first,) = await engine.submissions(1)
        await worker.change_role("prefill")
        assert (worker.role, worker.endpoint.path) == ("prefill", "dynamo.prefill.generate")
        (key,) = await runtime.discovery.get_prefix("v1/mdc/")
        assert key.startswith("v1/mdc/dynamo/prefill/generate/")
        after = await runtime.endpoint("dynamo.prefill.generate").client()
        new = await after.generate(request(n=2), annotated=False)
        second = (await engine.submissions(2))[1]
        assert second.startswith("Ledger ")
        assert len(engine.submitted) == 2  # a prefill worker makes one choice of many
        engine.step((first, 5), finish=True)
        assert [item["token_ids"] for item in await collect(old)] == [[5]]
        await new.aclose()


async def test_a_change_that_fails_changes_nothing(
    runtime: DistributedRuntime, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Changing()
    async with serving(runtime, engine, model_dir, disaggregation_mode="decode") as (worker, client):

        async def fail(*args: Any, **options: Any) -> None:
            raise DiscoveryError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr("dynamo.engine.serving.register_model", fail)
            with pytest.raises(DiscoveryError):
                await worker.change_role("prefill")
        assert (worker.role, worker.endpoint.path) == ("decode", "dynamo.backend.generate")
        stream = await client.generate(request(), annotated=False)
        (id_,) = await engine.submissions(1)
        engine.step((id_, 5), finish=True)
        assert [item["token_ids"] for item in await collect(stream)] == [[5]]
        await worker.change_role("prefill")  # and later it works
        assert worker.role == "prefill"


async def test_an_engine_that_cannot_change_says_so(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with serving(runtime, ScriptedEngine(), model_dir) as (worker, _):
        with pytest.raises(InvalidArgument, match="this engine cannot become prefill while it serves"):
            await worker.change_role("prefill")
        assert worker.role == "agg"


@pytest.mark.parametrize("start", ["agg", "prefill", "decode"])
def test_each_role_of_a_worker_has_an_endpoint_of_its_own(start: Any) -> None:
    component = "prefill" if start == "prefill" else "backend"
    options = WorkerOptions(endpoint=f"ns.{component}.generate", disaggregation_mode=start)
    paths = {role: path_of(role, options) for role in ROLES}
    assert len(set(paths.values())) == 3
    assert paths[start] == options.endpoint


def test_a_health_check_leaves_no_kv_behind() -> None:
    assert health_check_request("m")["annotations"] == [NO_HANDOFF]
