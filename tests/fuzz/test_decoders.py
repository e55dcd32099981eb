"""Does any decoder crash, hang, hold more than its limit or let a stranger through, whatever the bytes?"""

import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fuzz.__main__ import ROOT, TARGETS, found_before
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FIXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    before = logging.getLogger().handlers[:]
    module = importlib.import_module(f"fuzz.{request.param}")
    yield module
    logging.getLogger().handlers[:] = before


@pytest.fixture(scope="module", autouse=True)
def runtimes_are_closed() -> Iterator[None]:
    yield
    from fuzz.harness import LOOP

    for name in TARGETS:
        module = sys.modules.pop(f"fuzz.{name}", None)
        if (runtime := getattr(module, "RUNTIME", None)) is not None:
            LOOP.run_until_complete(runtime.close())


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A session that was valid, until this."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        at, until = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        piece = draw(
            st.binary(max_size=12) | st.just(data[at:until] * 2) | st.sampled_from(seeds) | st.just(b"\xff\xff\xff\xff")
        )
        data = data[:at] + piece + data[until if draw(st.booleans()) else at :]
    return data


def test_seeds_and_what_was_found_before_break_no_promise(target: ModuleType) -> None:
    from fuzz.harness import run

    for data in [*target.SEEDS, *found_before(target.__name__.rpartition(".")[2])]:
        run(target.one, data)


@given(data=st.data())
@FIXED
def test_no_bytes_break_a_promise(target: ModuleType, data: st.DataObject) -> None:
    from fuzz.harness import run

    run(target.one, data.draw(st.binary(max_size=600)))


@given(data=st.data())
@FIXED
def test_no_spoilt_session_breaks_a_promise(target: ModuleType, data: st.DataObject) -> None:
    from fuzz.harness import run

    run(target.one, data.draw(mutated(target.SEEDS)))


def test_the_seeds_get_as_far_as_they_should() -> None:
    from fuzz.harness import run

    from fuzz import events, request_server

    reached = request_server.WORKER.reached
    for seed in request_server.SEEDS:
        run(request_server.one, seed)
    assert request_server.WORKER.reached == reached + 3
    run(events.one, events.SEEDS[0])
    assert [event.sequence for event in events.HEARD] == [0]


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris cannot be had here: the extra `fuzz`")
@pytest.mark.parametrize("name", TARGETS)
def test_atheris_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--seconds", "1", "--keep", str(tmp_path), name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " executions in " in done.stdout
