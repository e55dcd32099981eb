"""What do the tests of serving engines share?"""

import pytest

from tests.engine.scripted import ScriptedEngine


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()
